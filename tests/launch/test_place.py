"""Which process of a run on several hosts this is, by flags or by what started it; how the end of one is told."""

import tempfile

import pytest

from fbi.errors import InputError
from fbi.launch.hosts import Hosts, Place, find
from fbi.launch.supervise import _how, _Peers

SAID = b"""E1122 coordination_service.cc:1549] Use error polling: UNAVAILABLE: The following tasks are unhealthy (\
stopped sending heartbeats):
3
12
The tasks have crashed. Check the task logs for an earlier error, or scheduler events to debug further.
*** Check failure stack trace: ***
    @     0x7f1240a40634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""


@pytest.mark.parametrize(
    ("hosts", "environment", "place"),
    [
        (Hosts(), {}, None),
        (Hosts("a:8476", 2, 1), {}, Place("a:8476", 2, 1, 20.0)),
        (Hosts("[::1]:8476", 2, 0, heartbeat=5.0), {}, Place("[::1]:8476", 2, 0, 5.0)),
        (Hosts(process=3), {"FBI_COORDINATOR": "a:1", "FBI_PROCESSES": "4"}, Place("a:1", 4, 3, 20.0)),
        (Hosts(processes=8), {"FBI_COORDINATOR": "a:1", "FBI_PROCESS": "0"}, Place("a:1", 8, 0, 20.0)),
        (Hosts("a:8476", 1, 0), {}, None),
        # the variables of `srun` with four tasks, of one task, and of a shell that salloc began
        (Hosts(), {"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "2"}, Place("", 4, 2, 20.0)),
        (Hosts(), {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        (Hosts(), {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, None),
        (Hosts("a:1", 2, 0), {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}, Place("a:1", 2, 0, 20.0)),
    ],
)
def test_where_a_process_stands(hosts, environment, place):
    assert find(hosts, environment) == place


@pytest.mark.parametrize(
    ("hosts", "environment", "says"),
    [
        (Hosts("a", 2, 0), {}, "coordinator='a' is not HOST:PORT"),
        (Hosts("a:99999", 2, 0), {}, "coordinator='a:99999' is not HOST:PORT"),
        (Hosts(processes=2, process=0), {}, "coordinator='' is not HOST:PORT"),
        (Hosts("a:1", 2), {}, "process=-1 of processes=2 does not exist"),
        (Hosts("a:1", 2, 2), {}, "process=2 of processes=2 does not exist"),
        (Hosts("a:1", process=0), {}, "process=0 of processes=0 does not exist"),
        (Hosts("a:1", 2), {"FBI_PROCESS": "one"}, "FBI_PROCESS='one' is not a whole number"),
        (Hosts(heartbeat=0.5), {}, "heartbeat=0.5 must be at least 1"),
        (Hosts(restarts=-1), {}, "restarts=-1 at least 0"),
    ],
)
def test_a_place_that_cannot_be(hosts, environment, says):
    with pytest.raises(InputError, match=says):
        find(hosts, environment)


def test_the_lost_processes_are_read_from_what_the_runtime_says(capfdbinary):
    with tempfile.TemporaryFile() as stream:
        stream.write(SAID)
        stream.seek(0)
        peers = _Peers(stream, own=3)
        peers.join()
    assert peers.lost == [12]
    said = capfdbinary.readouterr().err
    assert said.startswith(b"E1122")
    assert b"The tasks have crashed" in said
    assert b"stack trace" not in said
    assert b"absl::" not in said


def test_how_a_process_ended_is_one_clause():
    assert _how(-6, [3, 12], 20.0) == "was ended by the runtime (SIGABRT): process 3, 12 died or hangs"
    assert _how(-6, [], 20.0).endswith("another process of the run died or hangs")
    assert _how(-9, [], 20.0).startswith("was killed by SIGKILL, as the system does when memory runs out; the others")
    assert _how(-11, [], 20.0) == "was killed by SIGSEGV; the others end within 20 s"
    assert _how(1, [], 20.0) == "failed with exit code 1, as said above; the others end within 20 s"
