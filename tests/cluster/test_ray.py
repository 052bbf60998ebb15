"""Sweeps on Ray: one on a cluster of three nodes that loses one in the middle, one on a cluster of its own, stopped."""

import subprocess
import sys
import time
from contextlib import suppress

import cluster_support as support
import psutil
import pytest

pytestmark = pytest.mark.timeout(1800)  # the first one waits for the reference too


@pytest.fixture
def cluster(monkeypatch):
    """A head without cores, and two nodes with one core each."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            nodes.add_node(num_cpus=1)
        yield nodes
    finally:
        nodes.shutdown()


def raylet(node):
    """The process that starts the workers of a node."""
    return node.all_processes["raylet"][0].process.pid


def test_runs_that_lose_their_process_or_their_node_go_on(cluster, corpus, reference, tmp_path):
    root = tmp_path / "sweep"
    lost = sorted(cluster.worker_nodes, key=raylet)[0]

    def is_there(directory, running):
        return psutil.Process(running["executor"]).ppid() == raylet(lost)

    with support.Sweep(root, f"ray:address={cluster.address}", corpus) as sweep:
        first = sweep.catch()
        psutil.Process(first.process.ppid()).kill()
        # The training stands still, with its lock, and SIGTERM waits for it: whoever is to go on with it must wait too.
        time.sleep(5)
        assert first.process.is_running()
        assert len(support.starts(first.directory)) == 1
        first.let_go()
        second = sweep.catch(lambda directory, running: directory != first.directory and is_there(directory, running))
        executor = psutil.Process(second.process.ppid())
        cluster.remove_node(lost, allow_graceful=False)
        support.until(lambda: not executor.is_running(), "the worker of the lost node ends", 120)
        second.let_go()  # if Ray's worker has not killed it
        cluster.add_node(num_cpus=1)
        assert sweep.end() == 0, sweep.words
    assert "stopped at step" in support.starts(first.directory)[0]  # it saved a checkpoint
    support.assert_same(root, reference, [first, second])


def test_a_run_on_two_nodes_loses_a_process_and_goes_on(cluster, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    monkeypatch.setenv("FBI_TEST_MESH", "data=2")
    root = tmp_path / "sweep"
    with support.Sweep(root, f"ray:address={cluster.address},hosts=2", corpus, "tiny-fp-s0") as sweep:
        directory = support.until(lambda: next(root.glob("tiny-fp-s0-*"), None), "the plan")
        support.until(lambda: support.saved(directory) and support.last_step(directory) >= 10, "a checkpoint")
        trained = {}  # by its number: the process that trains
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                known = process.environ()
                if known.get("FBI_CHILD") and str(directory) in process.cmdline():
                    trained[known["FBI_PROCESS"]] = process
        assert sorted(trained) == ["0", "1"]
        workers = [process.parent().parent() for process in trained.values()]  # over each a parent, then its task
        assert {raylet(node) for node in cluster.worker_nodes} == {worker.ppid() for worker in workers}
        at = support.last_step(directory)
        trained["1"].kill()
        assert at < support.STEPS
        assert sweep.end() == 0, sweep.words
    assert (directory / "done.json").exists()
    assert support.last_step(directory) == support.STEPS
    assert "starting again from the last checkpoint" in (directory / "log-1.txt").read_text()
    assert "continuing from step" in (directory / "log.txt").read_text()


def test_a_sweep_asked_to_stop_goes_on_later(corpus, reference, tmp_path):
    root, only = tmp_path / "sweep", "tiny-fp-s[01]"
    with support.Sweep(root, "ray:at_once=1", corpus, only) as sweep:  # a cluster of its own
        caught = sweep.catch()
        sweep.stop()
        support.until(lambda: (caught.directory / "stop").exists(), "the request to stop", 120)
        caught.let_go()
        assert sweep.end() == 75, sweep.words
    assert not (caught.directory / "done.json").exists()
    assert (caught.directory / "checkpoints").exists()
    assert not list(root.glob("*/stop"))
    with support.Sweep(root, "ray", corpus, only) as sweep:
        assert sweep.end() == 0, sweep.words
    support.assert_same(root, reference, [caught], only + "-*")


def test_a_cluster_that_is_not_there_is_named(tmp_path, corpus):
    with support.Sweep(tmp_path / "sweep", "ray:address=auto", corpus) as sweep:
        assert sweep.end() == 2, sweep.words
    assert "no Ray cluster at 'auto'" in sweep.words
    assert "Traceback" not in sweep.words


def test_a_run_that_no_machine_can_hold_is_refused(tmp_path, corpus):
    with support.Sweep(tmp_path / "sweep", "ray:gpus=512", corpus) as sweep:
        assert sweep.end() == 2, sweep.words
    assert "a run needs 1 CPU, 512 GPU, which this machine does not have" in sweep.words


def test_without_ray_the_remedy_is_named(tmp_path, corpus):
    program = (
        "import sys, threading; sys.modules['ray'] = None\n"
        "from fbi.launch.launchers import parse; from fbi.launch.job import Job; from pathlib import Path\n"
        "parse('ray').launch([Job(Path('x'))], lambda: None, threading.Event())"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert "InputError: ray is not installed, which this launcher needs: pip install 'fbi[ray]'" in ended.stderr
