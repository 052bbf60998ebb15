"""Checkpoints: Orbax, asynchronous, verified on load, readable on any mesh.

A step pays for a copy of the state into the memory of its hosts, which the devices make in turn with their steps, and
for the sums that verify it; Orbax's work, the sums' way to the host and the disk are a thread's, one checkpoint at a
time. A process that dies amid that leaves the checkpoint before, for a folder gets its name when it is whole.
"""

import contextlib
import copy
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32
from orbax.checkpoint import v1 as ocp

from fbi.errors import InputError
from fbi.files import content_hash
from fbi.train import hosts
from fbi.train.attempt import Damaged, Result, attempt
from fbi.train.background import Background, snapshot
from fbi.train.step import State

training = ocp.training
# Orbax prints a traceback of every write that fails, and raises the exception besides: it is told once, in one line.
logging.getLogger("absl").addFilter(lambda record: not record.exc_info)


def _leaf_sum(leaf: Array) -> UInt32[Array, ""]:
    """The sum modulo 2^32 of a hash of each word and its place: the same on every mesh, as integers commute."""
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[leaf.dtype.itemsize]  # two words for 8 bytes
    bits = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(leaf, width)
    bits = bits.astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(_mix(bits ^ _mix(place)), dtype=jnp.uint32)


def _mix(word: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """MurmurHash3's finalizer, a bijection: a changed word changes the sum, whichever of its bits changed."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


@jax.jit
def _sums(tree: Any) -> list[Array]:
    return [_leaf_sum(leaf) for leaf in jax.tree.leaves(tree)]


def fingerprint(tree: Any) -> str:
    """A short hash of every bit of a tree of arrays, independent of how they are sharded."""
    return _name(_sums(tree))


def _name(sums: list[Array]) -> str:
    return content_hash([int(s) for s in jax.device_get(sums)])


class Checkpoints:
    """The checkpoints of one run, in `directory`. `host` is plain data that travels with the arrays."""

    def __init__(self, directory: Path, *, keep_last: int = 1, keep_every: int = 0):
        keep: list[Any] = [training.preservation_policies.LatestN(keep_last)]
        if keep_every:
            keep.append(training.preservation_policies.EveryNSteps(keep_every))
        self.directory = directory.absolute()
        self._options: dict[str, Any] = {  # Orbax's own protocols do not type-check against its own policies
            "save_decision_policy": training.save_decision_policies.FixedIntervalPolicy(1),
            "preservation_policy": training.preservation_policies.AnyPreservationPolicy(keep),
            "cleanup_tmp_directories": True,
        }
        self._writer: training.Checkpointer | None = None  # reading leaves alone what another process is writing
        self._background = Background()

    def _open(self) -> training.Checkpointer:
        if self._writer is None:
            self._writer = training.Checkpointer(str(self.directory), **self._options)
        return self._writer

    def save(self, step: int, state: State, host: dict[str, Any]) -> None:
        """Starts writing; returns once the arguments may be changed. A step that is there already is left as it is.

        Where the checkpoint before is still being written, waits for that: a disk that is too slow holds training up,
        and memory holds one copy of the state.
        """
        self.wait()
        if step in hosts.led(lambda: self.steps):
            return
        sums = {name: _sums(tree) for name, tree in state.items()}  # begun, and read in the thread
        content = {"host": copy.deepcopy(host), "kinds": {name: content_hash(_kinds(t)) for name, t in state.items()}}

        def begin(held: State) -> Any:
            whole = content | {"bits": {name: _name(found) for name, found in sums.items()}}
            noted: Any = whole | {"digest": content_hash(whole)}
            return self._open().save_checkpointables_async(step, dict(held), custom_metadata=noted, force=True)

        if jax.process_count() > 1:  # processes meet in Orbax by collectives, which must not cross those of a step
            with self._writing():
                begun = begin(state)
            self._background.start(begun.result)
        else:
            held = snapshot(state)
            self._background.start(lambda: begin(held).result())

    @property
    def took(self) -> float | None:
        """Seconds from `save` until the last checkpoint that was written was whole on disk; None before the first."""
        return self._background.took

    def wait(self) -> None:
        """Returns when nothing is being written; an `InputError` where the disk refused it."""
        with self._writing():
            self._background.wait()

    @property
    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal())

    def close(self) -> None:
        """Finishes writing and lets go of the folder."""
        with self._writing():
            try:
                self._background.close()
            finally:
                if self._writer:
                    self._writer.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Makes an `InputError` of what the disk refuses; a write fails in the call after the one that began it."""
        try:
            yield
        except (OSError, ValueError) as error:
            code = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore's are ValueErrors
            if not code and not isinstance(error, OSError):
                raise
            reason = os.strerror(int(code[1])) if code else getattr(error, "strerror", None) or error
            raise InputError(
                f"cannot write a checkpoint in {self.directory}: {reason}; "
                "free some space, then the same command continues"
            ) from error

    def restore(self, abstract: State, say: Callable[[str], None]) -> tuple[int, State, dict[str, Any]] | None:
        """The newest whole checkpoint as (step, state, host), onto the shardings of `abstract`; None where none is.

        A damaged one (unreadable, or its bits are not those written) is reported through `say` and moved to the folder
        `damaged` beside this one; the one before is taken. Other shapes or types than those of `abstract` are an
        `InputError`: that is another model, not damage.
        """
        self.wait()
        found = None
        for step in reversed(hosts.led(lambda: self.steps)):
            try:
                if found is None:
                    found = (step, *self._everywhere(lambda step=step: self.read(step, abstract)))
                else:  # Orbax refuses a folder with any description that it cannot read
                    self._everywhere(lambda step=step: self._describe(step))
            except Damaged as damage:
                then = "" if found else ", going back to the one before"
                place = hosts.led(lambda step=step: str(self._set_aside(step)))
                say(f"checkpoint {step} is damaged ({damage}); moved to {place}{then}")
        self._open().reload()
        return found

    def _everywhere(self, read: Callable[[], Result]) -> Result:
        """What `read` gives, or `Damaged` where it is that for any process of the run: all must go on from one step."""
        problem, found = "", None
        try:
            found = read()
        except Damaged as damage:
            problem = str(damage)
        if problem := next(filter(None, hosts.told(problem)), ""):
            raise Damaged(problem)
        return cast(Result, found)

    def read(self, step: int, abstract: State) -> tuple[State, dict[str, Any]]:
        """The parts of a checkpoint that `abstract` names, and its host data.

        Raises `Damaged` where they cannot be read or differ from what was written, `InputError` for other shapes or
        types.
        """
        kinds, content = self._describe(step)
        for name, tree in abstract.items():
            if content_hash(kinds.get(name)) != content["kinds"].get(name):
                raise Damaged(f"the shapes of its {name} are not those that were written")
            if problem := _difference(name, kinds[name], _kinds(tree)):
                raise InputError(f"checkpoint {step} of {self.directory} is of another model: {problem}")
        state: State = {}
        for name in abstract:
            part = {name: abstract[name]}  # one by one: where one fails, Orbax never awaits its coroutines for the rest
            state |= attempt(lambda part=part: ocp.load_checkpointables(str(self.directory / str(step)), part))
            if fingerprint(state[name]) != content["bits"][name]:
                raise Damaged(f"the bits of its {name} are not those that were written")
        return state, content["host"]

    def _describe(self, step: int) -> tuple[dict[str, dict[str, str]], dict[str, Any]]:
        """The types and shapes in a checkpoint, and what `save` noted of it."""

        def describe() -> tuple[dict[str, dict[str, str]], dict[str, Any]]:
            described = ocp.checkpointables_metadata(str(self.directory / str(step)))
            content = dict(cast(dict[str, Any], described.custom_metadata or {}))
            if content.pop("digest", None) != content_hash(content):
                raise Damaged("its description does not match its digest")
            if unread := [name for name in content["kinds"] if described.metadata.get(name) is None]:
                raise Damaged(f"its {' and '.join(unread)} cannot be read")
            return {name: _kinds(tree) for name, tree in described.metadata.items()}, content

        return attempt(describe)

    def _set_aside(self, step: int) -> Path:
        folder = self.directory.parent / "damaged"
        folder.mkdir(exist_ok=True)
        target = next(t for i in range(1000) if not (t := folder / f"{step}-{i}").exists())
        shutil.move(self.directory / str(step), target)
        return target


def _difference(name: str, found: dict[str, str], wanted: dict[str, str]) -> str | None:
    for path in dict.fromkeys([*wanted, *found]):
        if wanted.get(path) != found.get(path):
            return f"{name}{path} is {found.get(path, 'absent')} there and {wanted.get(path, 'absent')} here"
    return None


def _kinds(tree: Any) -> dict[str, str]:
    """The type and shape of each leaf, such as float32[128, 384]."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_path(path): f"{jnp.dtype(leaf.dtype)}{list(leaf.shape)}" for path, leaf in flat if hasattr(leaf, "shape")}


def _path(path: tuple) -> str:
    names = (getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", None))) for entry in path)
    return "".join(f".{name}" for name in names)


def load_params(directory: Path, abstract: Any, step: int | None = None) -> Any:
    """The parameters of the newest (or named) checkpoint in `directory`, without its optimizer, as `abstract` has them.

    Raises `InputError` where there is none, or where it is damaged.
    """
    if not directory.is_dir():
        raise InputError(f"there are no checkpoints in {directory}")
    checkpoints = Checkpoints(directory)
    steps = checkpoints.steps
    if not steps or (step is not None and step not in steps):
        raise InputError(f"no checkpoint {'' if step is None else step} in {directory}; it has {steps}")
    chosen = steps[-1] if step is None else step
    try:
        return checkpoints.read(chosen, {"params": abstract})[0]["params"]
    except Damaged as damage:
        raise InputError(f"checkpoint {chosen} of {directory} is damaged: {damage}") from damage
