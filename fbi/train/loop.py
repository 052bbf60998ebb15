"""The one training loop.

The order of each turn is fixed: evaluate, save, next batch, step, log. Evaluation and checkpoint at step n see the
state after n steps; metrics are read one step late, while the device is busy with the next; nothing is saved before
the metrics of its step were read and found sound. Diagnostics of step n look at the state before and after it, and are
read and recorded with its metrics.
"""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from fbi.analysis.diagnostics import Diagnostics
from fbi.data.loader import Batches, merge_ranges
from fbi.data.table import TaughtBatches
from fbi.errors import InputError
from fbi.loss import Loss
from fbi.train.checkpoint import Checkpoints
from fbi.train.goodput import Clock
from fbi.train.grace import Grace
from fbi.train.guard import Guard
from fbi.train.hosts import Votes
from fbi.train.mesh import put_batch, put_scalar
from fbi.train.profile import Profile
from fbi.train.progress import Reporter
from fbi.train.run import Execution, Run
from fbi.train.rundir import Metrics
from fbi.train.step import State, Step

Pending = tuple[int, dict[str, jax.Array], Any]  # (step, sums, what was diagnosed), on the devices
Finish = Callable[[State, int], tuple[State, list[dict[str, Any]]]]  # (state, step) -> (state, rows)
Rows = Callable[[State, int, bool], list[dict[str, Any]]]  # (state, step, last) -> rows of an evaluation


class Stopped(Exception):
    """A signal asked the run to end; its checkpoint is on disk."""

    def __init__(self, step: int):
        super().__init__(f"stopped at step {step}; the same command continues")
        self.step = step


class StopSignal:
    """Turns signals into a flag that the loop reads between steps; a second SIGINT ends at once.

    SIGTERM, SIGINT, and those with which Slurm gives notice (--signal=USR1@120), unless an executor takes these.
    """

    def __init__(self):
        self.received: int | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
                usual = number in (signal.SIGTERM, signal.SIGINT)
                if usual or signal.getsignal(number) is not signal.SIG_IGN:  # as where an executor takes it
                    self._old[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        del frame
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


@dataclasses.dataclass
class Loop:
    """The parts of a run, put together; `train` carries it out."""

    run: Run
    execution: Execution
    mesh: jax.sharding.Mesh
    step: Step
    fresh: Callable[[], State]
    abstract: State
    teacher_params: Any
    batches: Callable[[tuple[tuple[int, int], ...]], Batches | TaughtBatches]
    evaluate: Rows
    learning_rate: Callable[[int], float]
    checkpoints: Checkpoints
    metrics: Metrics
    reporter: Reporter
    diagnostics: Diagnostics | None = None
    clock: Clock = dataclasses.field(default_factory=Clock)
    profile: Profile = Profile(None, Path())
    finish: Finish = lambda state, step: (state, [])  # of the state after the last step, before it is evaluated

    def __post_init__(self):
        self.guard = Guard(self.run.guard)
        self.task = Loss.parse(self.run.loss).task  # what the guard watches
        self.skipped: tuple[tuple[int, int], ...] = ()
        self.returns = 0
        self.sums: dict[str, float] = {}  # of the row being gathered
        self.since = time.perf_counter()
        self.grace = Grace(self.execution.grace)
        self.loss = 0.0  # the one that was read last
        self.evaluated = -1  # the step whose evaluation is in the record

    def train(self) -> State:
        """Runs to the last step and returns the state; raises `Stopped` after a signal."""
        with StopSignal() as stop:
            votes = Votes(self.mesh)  # what asks one process to stop, stops all of them at the same step
            state, step = self._resume()
            iterator, pending = self._iterate(step), None
            while True:
                if late := self.grace.turn(self.checkpoints.took):
                    self._say(late)
                last, stopping = step == self.run.steps, votes.stopping(stop.received is not None, self.loss)
                save = last or stopping or self._due(self.execution.checkpoint_every, step)
                look = last or self._due(self.execution.eval_every, step)
                if pending and (save or look):
                    fault, pending = self._log(pending), None
                    if fault:
                        state, step, iterator = self._go_back(step, fault)
                        continue
                if last and step != self.evaluated:  # a restored state was finished before it was saved
                    state, told = self.finish(state, step)
                    for row in told:
                        self.metrics.append(row)
                if look and step != self.evaluated:
                    self._evaluate(state, step, last)
                if save and step != 0:
                    with self.clock.aside():
                        self.checkpoints.save(step, state, self._host())
                if last:
                    return state
                if stopping:  # as it was at the top of this turn: then this step was saved
                    self.profile.close(step)
                    raise Stopped(step)
                tokens = put_batch(next(iterator), self.mesh, self.run.data.batch)
                progress = put_scalar(step / self.run.steps, self.mesh)
                held = self._before(step + 1, state, tokens, progress)
                with self.clock.call(), self.profile.step(step + 1), jax.transfer_guard_host_to_device("disallow"):
                    state, sums = self.step(state, self.teacher_params, tokens, progress)
                step += 1
                self.profile.after(step, sums)
                fault, pending = self._log(pending), (step, sums, self._after(held, state, progress))
                if fault:
                    pending = None
                    state, step, iterator = self._go_back(step - 1, fault)

    def _due(self, every: int, step: int) -> bool:
        return every > 0 and step % every == 0

    def _iterate(self, step: int) -> Iterator[Any]:
        self.since = time.perf_counter()
        self.clock.mark()
        return iter(self.batches(self.skipped).iterate(step))

    def _host(self) -> dict[str, Any]:
        ranges = [list(r) for r in self.skipped]
        kept = {"skipped": ranges, "returns": self.returns, "sums": self.sums, "guard": self.guard.state}
        return kept | {"time": self.clock.state}

    def _resume(self, *, keep_events: bool = False) -> tuple[State, int]:
        """The state to go on from and its step; the record is cut back to it."""
        restored = self.checkpoints.restore(self.abstract, self._say)
        if restored is None:
            if self.metrics.path.exists():
                self._say("no checkpoint to continue from, starting from the beginning")
            self.metrics.rewind(-1, keep_events)
            self.guard, self.sums, self.evaluated = Guard(self.run.guard), {}, -1
            self.clock.resume(0.0, 0.0)
            self.reporter.restart(0)
            return self.fresh(), 0
        step, state, host = restored
        self.metrics.rewind(step, keep_events)
        self.guard.state, self.sums = host["guard"], dict(host["sums"])
        self.clock.resume(*host.get("time", (0.0, 0.0)))  # absent from the checkpoints of earlier versions
        self.returns = max(self.returns, host["returns"])
        self.skipped = tuple(merge_ranges([*self.skipped, *(tuple(r) for r in host["skipped"])]))
        self.evaluated = step  # evaluation comes before saving: what was due at this step is in the record
        self.reporter.restart(step)
        self._say(f"continuing from step {step}")
        return state, step

    def _say(self, text: str) -> None:
        self.reporter.say(f"{self.run.name}: {text}")

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """What is done within is no part of the training rate."""
        began = time.perf_counter()
        with self.clock.aside():
            yield
        self.since += time.perf_counter() - began

    def _evaluate(self, state: State, step: int, last: bool) -> None:
        with self._aside():
            for row in self.evaluate(state, step, last):
                self.metrics.append(row | self.clock.row if row["kind"] == "eval" else row)
                if row["kind"] == "eval" and last:
                    self._say(f"validation {row['loss']:.4f} nats/token, {row['bits_per_byte']:.4f} bits/byte")
        self.evaluated = step

    def _before(self, step: int, state: State, tokens: Any, progress: jax.Array) -> Any:
        """What diagnostics of the coming `step` keep of the state that it consumes; None where none are due."""
        if self.diagnostics is None or not self._due(self.execution.diagnose_every, step):
            return None
        with self._aside():
            return self.diagnostics.before(state["params"], self.teacher_params, tokens, progress)

    def _after(self, held: Any, state: State, progress: jax.Array) -> Any:
        if self.diagnostics is None or held is None:
            return None
        with self._aside():
            return self.diagnostics.after(held, state["params"], progress)

    def _log(self, pending: Pending | None) -> str | None:
        """Reads the metrics of a step, writes a row where one is due, and says what is wrong with it, if anything."""
        if pending is None:
            return None
        step, sums = pending[0], {name: float(value) for name, value in jax.device_get(pending[1]).items()}
        self.loss = loss = sums["loss"] / sums["count"]
        task = self.task(sums) / sums["count"] if math.isfinite(loss) else loss
        if fault := self.guard.fault(task, sums["grad_norm"]):
            return fault
        self.clock.step()
        for name, value in (sums | {"steps": 1.0}).items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        now, tokens = time.perf_counter(), self.run.data.batch * self.run.data.window
        rate = tokens * self.sums["steps"] / max(now - self.since, 1e-9)
        self.reporter.update(step, f"loss {loss:.4f}, {rate:,.0f} tokens/s")
        if self._due(self.execution.log_every, step) or step == self.run.steps:
            gathered, self.sums = self.sums, {}
            count, steps = gathered.pop("count"), gathered.pop("steps")
            means = {"grad_norm": gathered.pop("grad_norm") / steps} | {k: v / count for k, v in gathered.items()}
            times = {"time_step_s": (now - self.since) / steps, "time_tokens_per_s": rate} | self.clock.row
            lr = self.learning_rate(step - 1)
            self.metrics.append({"kind": "train", "step": step, "tokens": step * tokens, **means, "lr": lr, **times})
            self.since = now
        if self.diagnostics is not None and pending[2] is not None:
            for row in self.diagnostics.rows(pending[2], step):
                self.metrics.append(row)
        return None

    def _go_back(self, step: int, fault: str) -> tuple[State, int, Iterator[Any]]:
        """Returns to the last checkpoint and skips the data from there to the fault; FBI-LLM, 2407.07093, section 4."""
        self.returns += 1
        if self.returns > self.run.guard.retries:
            raise InputError(
                f"{self.run.name}: at step {step} {fault}, after {self.run.guard.retries} returns to a checkpoint; "
                "lower optimizer.lr, or raise guard.retries or guard.spike"
            )
        self._say(f"at step {step} {fault}; returning to the last checkpoint and skipping the data since")
        before = self.batches(self.skipped)
        state, restored = self._resume(keep_events=True)
        first, end = before.position(restored), before.position(max(step - 1, restored)) + 1
        self.skipped = tuple(merge_ranges([*self.skipped, (first, end)]))
        text = f"{fault}; back to step {restored}, batches {first} to {end - 1} skipped"
        self.metrics.append({"kind": "event", "step": restored, "what": "returned", "text": text})
        return state, restored, self._iterate(restored)
