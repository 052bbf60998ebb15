"""The real training step of a run, traced and compiled for a target from shapes alone."""

import collections
import contextlib
import dataclasses
import math
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import jax

from fbi.data.table import Table, is_table
from fbi.errors import InputError
from fbi.model import Model
from fbi.model.config import PRESETS, ModelConfig
from fbi.policy import Policy
from fbi.preflight import hlo
from fbi.preflight.model import Layout
from fbi.preflight.targets import Target, devices
from fbi.train import mesh as meshes
from fbi.train.compose import check
from fbi.train.program import program, step_arguments
from fbi.train.run import Run
from fbi.train.rundir import read_run
from fbi.train.teacher import Tabled

LARGE = 64 << 20  # bytes from which on an array that every device holds is worth a warning
_NEEDED = (  # as compilers say what a program needed
    r"Used ([\d.]+)([KMGT]?) of",
    r"required for HLO temporaries \(([\d.]+)([KMGT]?)\)",
    r"allocat\w+ ([\d.]+)([KMGT]?)i?B?",
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class TooLarge(InputError):
    """The compiler refused the program for its memory; `needed` is what it asked for, in bytes."""

    def __init__(self, text: str, needed: float):
        super().__init__(text)
        self.needed = needed


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one compiled step says of itself. Bytes are of one device."""

    parameters: int
    optimizer: int
    teacher: int
    batch: int
    temporaries: int
    """All else at the peak: activations, gradients, gathered weights, results that take no argument's place."""
    code: int
    collectives: tuple[hlo.Collective, ...]
    warnings: tuple[str, ...]
    trace_s: float
    lower_s: float
    compile_s: float

    @property
    def peak(self) -> int:
        """Arguments, temporaries, code."""
        return self.parameters + self.optimizer + self.teacher + self.batch + self.temporaries + self.code


def teacher_of(run: Run) -> tuple[ModelConfig, str] | None:
    """Shape and policy of the teacher: of its run directory, or of the preset that it is named after; None without one.

    A table of what a teacher said is none: no parameters of it are in memory.
    A preset computes in the student's type. `InputError` where the name is neither.
    """
    if not run.teacher or is_table(run.teacher):
        return None
    directory = Path(run.teacher)
    if (directory / "config.json").exists():
        taught = read_run(directory)
        return taught.model, taught.policy
    if directory.name not in PRESETS:
        raise InputError(
            f"teacher={run.teacher!r} is neither a run directory nor named after a model preset, so its shape is not "
            f"known; name it after one, as teacher=runs/llama2-7b, or give a directory with a config.json"
        )
    return dataclasses.replace(PRESETS[directory.name], dtype=run.model.dtype), "fp"


def compile_step(run: Run, layout: Layout, target: Target, compiler: str, unroll: int = 1) -> Compiled:
    """Compiles the step of `run` in `layout` for `target`, by the compiler of `compiler_for`.

    `InputError` for a run or layout that cannot be; `TooLarge` where the compiler refuses it for its memory.
    """
    execution = layout.execution(unroll)
    there = devices(target, compiler)
    check(run, execution, len(there))
    taught = teacher_of(run)
    mesh = meshes.make(meshes.parse(layout.mesh, len(there)), there)
    with jax.set_mesh(mesh), _no_cache(compiler):
        teacher = Model(taught[0], Policy.parse(taught[1])) if taught else None
        table = Table(run.teacher).layout if is_table(run.teacher) else None
        who = Tabled() if table else teacher
        built = program(run, execution, teacher=who, separator=0 if run.data.mask_documents else None)
        arguments = step_arguments(run, built, teacher, table)
        began = time.perf_counter()
        traced = cast(Any, built.step).trace(*arguments)  # it is jitted
        at_lower = time.perf_counter()
        lowered = traced.lower()
        at_compile = time.perf_counter()
        try:
            compiled, text = _compiled(lowered, compiler)
        except jax.errors.JaxRuntimeError as error:
            raise refusal(str(error), layout, target) from error
        ended = time.perf_counter()
    return _read(compiled, text, lowered, arguments, mesh, (began, at_lower, at_compile, ended))


def _compiled(lowered: Any, compiler: str) -> tuple[Any, str]:
    """The program, and its optimized text.

    That of a TPU's is written by its compiler: jaxlib cannot read all that it makes (work given to a SparseCore).
    """
    if compiler != "tpu":
        compiled = lowered.compile()
        return compiled, compiled.as_text()
    with tempfile.TemporaryDirectory(prefix="fbi-preflight-") as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        programs = Path(folder).rglob("*after_optimizations.txt")
        return compiled, max(programs, key=lambda path: path.stat().st_size).read_text()


@contextlib.contextmanager
def _no_cache(compiler: str) -> Iterator[None]:
    """Programs of described devices stay out of the compilation cache: they could not be loaded here."""
    if compiler == "cpu":
        yield
        return
    before = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def refusal(text: str, layout: Layout, target: Target) -> InputError:
    """The compiler's error as one of ours: too large where it says so, otherwise its first line."""
    if "RESOURCE_EXHAUSTED" in text:
        found = (re.search(pattern, text) for pattern in _NEEDED)
        used = next(filter(None, found), None)
        needed = float(used[1]) * _UNITS[used[2]] if used else math.nan
        return TooLarge(f"{layout.mesh} on {target.name}: {text.splitlines()[0]}", needed)
    return InputError(f"the compiler of {target.name} refused {layout.mesh}: {text.strip().splitlines()[0]}")


def _read(compiled: Any, text: str, lowered: Any, arguments: tuple, mesh: jax.sharding.Mesh, times: tuple) -> Compiled:
    state, teacher, tokens, _ = arguments
    parameters, optimizer = _bytes(state["params"]), _bytes({k: v for k, v in state.items() if k != "params"})
    taught, batch = _bytes(teacher), _bytes(tokens)
    memory = compiled.memory_analysis()
    extra = max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
    temporaries = memory.temp_size_in_bytes + extra
    found = tuple(hlo.collectives(text, mesh.size))
    began, at_lower, at_compile, ended = times
    return Compiled(
        parameters=parameters,
        optimizer=optimizer,
        teacher=taught,
        batch=batch,
        temporaries=temporaries,
        code=memory.generated_code_size_in_bytes,
        collectives=found,
        warnings=(*_replicated(arguments, mesh), *_recompiles(lowered, state), *_hoistable(found)),
        trace_s=at_lower - began,
        lower_s=at_compile - at_lower,
        compile_s=ended - at_compile,
    )


def _bytes(tree: Any) -> int:
    """Of one device, all arrays of the tree together."""
    return sum(math.prod(_shard(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _shard(leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    return leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape


def _replicated(arguments: tuple, mesh: jax.sharding.Mesh) -> Iterator[str]:
    """Large arrays of which every device holds all."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(arguments)[0]:
        size = leaf.size * leaf.dtype.itemsize
        if mesh.size > 1 and size >= LARGE and _shard(leaf) == leaf.shape:
            name = jax.tree_util.keystr(path[1:], simple=True, separator=".")
            yield f"{name} {leaf.shape} is whole on every device: {size / 2**30:.2f} GiB each; split one of its axes"


def _recompiles(lowered: Any, state: Any) -> Iterator[str]:
    """Parts of the state that come out of the step in another type than they went in: the next step compiles anew."""
    after = jax.tree.leaves(lowered.out_info[0])
    flat = jax.tree_util.tree_flatten_with_path(state)[0]
    for (path, before), out in zip(flat, after, strict=True):
        if (before.shape, before.dtype) != (out.shape, out.dtype):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            yield (
                f"{name} goes into the step as {before.dtype}{list(before.shape)} and comes out as "
                f"{out.dtype}{list(out.shape)}: the second step compiles again"
            )


def _hoistable(found: tuple[hlo.Collective, ...]) -> Iterator[str]:
    """Large collectives of a value that no turn of their loop changes; alike ones are counted."""
    alike = collections.Counter(
        f"{c.kind} {c.source or c.name} of {c.bytes / 2**20:.1f} MiB runs {c.times} times in a loop, each time of the "
        "same value"
        for c in found
        if c.hoistable and c.times * c.bytes >= LARGE
    )
    for text, count in alike.items():
        yield f"{text}{f' ({count} such)' if count > 1 else ''}; do it once before the loop"
