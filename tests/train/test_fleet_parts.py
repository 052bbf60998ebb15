"""The parts that fleets need, one by one: the clock of goodput, grace, profiles, work in the background."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbi.errors import InputError
from fbi.train.background import Background, snapshot
from fbi.train.goodput import Clock
from fbi.train.grace import Grace
from fbi.train.profile import Profile, parse


class Time:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


def steps(clock, time, seconds, compile_time=0.0):
    """Steps of these lengths, as the loop does them."""
    clock.mark()
    for index, length in enumerate(seconds):
        with clock.call():
            time.passes(compile_time if index == 0 else 0.0)
        time.passes(length)
        clock.step()


def test_useful_time_is_that_of_steps_alone():
    time = Time()
    clock = Clock(now=time)
    time.passes(7)  # start-up
    steps(clock, time, [2, 2, 3], compile_time=20)
    with clock.aside():
        time.passes(5)  # an evaluation
    time.passes(2)
    clock.step()
    assert clock.row == {"time_useful_s": 2 + 2 + 3 + 2, "time_wall_s": 7 + 20 + 2 + 2 + 3 + 5 + 2}
    with clock.call():
        time.passes(4)  # only the first call compiles
    clock.step()
    assert clock.useful == 9 + 4


def test_steps_that_are_done_again_count_once_and_their_time_twice():
    time = Time()
    clock = Clock(now=time)
    steps(clock, time, [1, 1, 1])
    kept = clock.state
    steps(clock, time, [1, 1])  # lost: the guard goes back
    clock.resume(*kept)
    steps(clock, time, [1, 1])
    assert clock.row == {"time_useful_s": 5, "time_wall_s": 7}


def test_a_killed_attempt_counts_up_to_its_last_sign_of_life(tmp_path):
    path, time = tmp_path / "clock", Time()
    first = Clock(path, time)
    kept = []

    def attempt():
        with first:
            steps(first, time, [1, 1, 1])
            kept.extend(first.state)
            steps(first, time, [1, 1])
            raise KeyboardInterrupt  # whose last sign is the end itself

    with pytest.raises(KeyboardInterrupt):
        attempt()
    time.passes(1000)  # in no attempt
    second = Clock(path, time)
    assert second.wall == 5
    with second:
        time.passes(10)
        second.resume(*kept)
        steps(second, time, [1, 1, 1], compile_time=4)
        assert second.row == {"time_useful_s": 3 + 3, "time_wall_s": 5 + 10 + 4 + 3}
        assert path.exists()
    assert not path.exists()  # done
    path.write_text("torn")
    third = Clock(path, time)
    third.resume(*kept)
    assert third.row == {"time_useful_s": 3, "time_wall_s": 3}


def test_what_fails_before_the_first_step_leaves_no_file(tmp_path):
    with pytest.raises(InputError), Clock(tmp_path / "clock"):
        raise InputError("no such corpus")
    assert not (tmp_path / "clock").exists()


def test_grace_is_the_longest_turn_and_a_checkpoint():
    time = Time()
    grace = Grace(30.0, time)
    for turn in (100, 10, 4):  # the first compiles
        assert grace.turn(None) is None
        time.passes(turn)
    assert grace.turn(20.0) is None
    assert grace.longest == 10
    assert "a turn takes up to 10 s and writing 20.5 s, more than grace=30;" in (grace.turn(20.5) or "")
    assert grace.turn(20.5) is None  # said once
    assert Grace(0.0, time).turn(1e6) is None


def test_steps_to_profile_are_read_from_text():
    assert parse("", 20) is None
    assert parse("10:15", 20) == range(10, 16)
    assert parse("1:20", 20) == range(1, 21)


@pytest.mark.parametrize("text", ["10", "10-15", "a:b", "-1:3", "1:2:3", "1:", "1.5:2"])
def test_steps_to_profile_that_are_none_are_refused(text):
    with pytest.raises(InputError, match=r"is not FIRST:LAST; for steps 10 to 15 write 10:15"):
        parse(text, 20)


@pytest.mark.parametrize("text", ["0:3", "5:4", "10:21", "21:22"])
def test_steps_to_profile_beyond_the_run_are_refused(text):
    with pytest.raises(InputError, match=rf"profile='{text}' must name steps from 1 to 20"):
        parse(text, 20)


def test_a_profile_lies_where_it_says(tmp_path):
    said = []
    profile = Profile(range(2, 4), tmp_path, said.append)
    double = jax.jit(lambda x: 2 * x)
    for number in range(1, 6):
        with profile.step(number):
            result = double(jnp.ones(3))
        profile.after(number, result)
        assert bool(said) == (number >= 3)
    (line,) = said
    assert line.startswith(f"steps 2 to 3 traced into {tmp_path}; open with `tensorboard --logdir {tmp_path}`")
    assert [path.suffixes for path in tmp_path.rglob("*.xplane.pb")] == [[".xplane", ".pb"]]
    assert len(list(tmp_path.rglob("*.trace.json.gz"))) == 1


def test_a_run_that_is_past_its_profile_says_so(tmp_path):
    said = []
    profile = Profile(range(2, 4), tmp_path, said.append)
    for number in (4, 5):
        with profile.step(number):
            pass
    assert said == ["nothing traced: step 4 is past profile=2:3"]
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_outlives_what_a_step_takes_over():
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    whole = np.arange(64, dtype=np.float32).reshape(8, 8)
    with jax.set_mesh(mesh):
        tree = {
            "w": jax.device_put(whole, jax.NamedSharding(mesh, jax.P("data", "model"))),
            "count": jax.device_put(np.int32(7), jax.NamedSharding(mesh, jax.P())),
        }
        held = snapshot(tree)
        stepped = jax.jit(lambda t: jax.tree.map(lambda x: x * 2, t), donate_argnums=0)(tree)
        jax.block_until_ready(stepped)
    np.testing.assert_array_equal(held["w"], whole)
    assert int(held["count"]) == 7
    assert held["w"].sharding.spec == jax.P("data", "model")
    assert held["w"].sharding.memory_kind == "pinned_host"
    np.testing.assert_array_equal(stepped["w"], 2 * whole)


def test_background_work_is_one_at_a_time_and_fails_in_the_next_wait():
    background, gate, done = Background(), threading.Event(), []
    background.start(lambda: gate.wait(60) and done.append(1))
    assert done == []  # the caller goes on
    assert background.took is None
    threading.Timer(0.05, gate.set).start()
    background.start(lambda: done.append(2))  # held up until the first is done
    assert done[0] == 1
    background.wait()
    assert done == [1, 2]
    assert background.took is not None

    def refused() -> None:
        raise OSError("disk full")

    background.start(refused)
    with pytest.raises(OSError, match="disk full"):
        background.start(lambda: done.append(3))
    background.close()
    assert done == [1, 2]
