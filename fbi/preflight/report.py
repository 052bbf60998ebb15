"""What a preflight found: numbers as plain data, shown as tables or JSON; and what to do where a run does not fit."""

import importlib.metadata
import math
from collections.abc import Callable
from typing import Any

from fbi.errors import InputError
from fbi.preflight.compile import Compiled, TooLarge, compile_step, teacher_of
from fbi.preflight.hlo import axis_of
from fbi.preflight.model import Estimate, Layout, Remat, divides, layouts, ranked, seconds_of_links
from fbi.preflight.targets import Target, compiler_for, larger
from fbi.report.table import Column, Table
from fbi.train import mesh as meshes
from fbi.train.run import Run

GIB = 2**30
TRIES = 4  # programs compiled at most before a run is said not to fit
HOPELESS = 1.5  # times the memory, from which on an estimate is believed without asking the compiler
SAID = {
    "tpu": "the TPU compiler (libtpu {}), on a description of the slice",
    "cuda": "the GPU compiler (jaxlib {}), on a description of the GPUs",
    "cpu": "the CPU compiler over emulated devices: sharding and collectives as there, temporaries not",
}


def wanted(
    run: Run, target: Target, mesh: str = "", accumulate: int = 0, remat: Remat | str = "", sequence: bool = False
) -> tuple[list[Estimate], bool]:
    """Layouts that leave what is given as it is, the best first; and whether the mesh was given.

    `sequence` splits the residual stream by position in those of a model axis that divides the window.

    `InputError` for a mesh that needs more devices than the target has, or that does not divide what it splits.
    """
    taught = teacher_of(run)
    teacher = taught[0] if taught else None
    if accumulate < 0:
        raise InputError(f"accumulate={accumulate} must be at least 1, or 0 for a suggestion")
    if mesh:
        sizes = meshes.parse(mesh, target.count)
        meshes.check(sizes, run.model, run.data.batch, accumulate or 1)
        if teacher:
            meshes.check(sizes, teacher, run.data.batch, accumulate or 1, "teacher")
        parts = [n for n in range(1, run.data.batch + 1) if run.data.batch % n == 0]
        options = [Layout(sizes["data"], sizes["model"], n, r) for n in parts for r in ("none", "products", "full")]
        options = [option for option in options if divides(run, option, teacher)]
    else:
        options = layouts(run, target, teacher)
    chosen = [o for o in options if accumulate in (0, o.accumulate) and remat in ("", o.remat)]
    if not chosen:
        raise InputError(
            f"accumulate={accumulate}: no mesh of {target.name} divides data.batch={run.data.batch} / accumulate; use "
            f"one of {sorted({o.accumulate for o in options})[:8]}"
        )
    if sequence:
        chosen = [o._replace(sequence=True) for o in chosen if run.data.window % o.model == 0]
        if not chosen:
            raise InputError(f"sequence: the model axis of mesh={mesh!r} does not divide data.window={run.data.window}")
    return ranked(run, target, teacher, chosen), bool(mesh)


def preflight(
    run: Run,
    target: Target,
    *,
    mesh: str = "",
    accumulate: int = 0,
    remat: Remat | str = "",
    sequence: bool = False,
    unroll: int = 1,
    compiler: str = "auto",
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Compiles the step of `run` for `target` in the best layout that leaves what is given as it is; see `found`.

    Where the compiled program does not fit although its estimate did, the next that should is compiled, a few times;
    `say` is told of each that did not.

    Bytes are of one device, seconds of a step at the roofline (arithmetic, memory, links, the slowest of them).
    `InputError` for input that cannot be, for a compiler that is not installed, and for a run that does not fit, which
    says by how much and what would.
    """
    used = compiler_for(target, compiler)
    options = wanted(run, target, mesh, accumulate, remat, sequence)[0]
    limit, grown, needed = target.chip.limit, 1.0, math.nan
    best = options[0]
    if best.memory > HOPELESS * limit:
        raise _unfit(run, target, best, best.memory, "estimated")
    for left in reversed(range(TRIES)):
        try:
            compiled = compile_step(run, best.layout, target, used, unroll)
            needed = float(compiled.peak)
            if needed <= limit:
                return found(run, target, best, compiled, used, unroll)
        except TooLarge as error:
            needed = error.needed
        # what this program needed beyond its estimate, at least a tenth, others may need as well
        grown = max(1.1 * grown, 1.05 * needed / best.memory) if needed == needed else 1.3 * grown
        smaller = [e for e in options if e.memory * grown <= limit and e.memory < best.memory]
        if not smaller or not left:
            break
        say(
            f"{best.layout.flags()} needs {_size(needed)} of {_size(limit)} a chip; {smaller[0].layout.flags()} is next"
        )
        best = smaller[0]
    raise _unfit(run, target, best, needed, "compiled")


def found(run: Run, target: Target, best: Estimate, compiled: Compiled, compiler: str, unroll: int) -> dict[str, Any]:
    """Everything that is known of a run on a target, as plain data."""
    layout, chip = best.layout, target.chip
    chips = layout.data * layout.model
    collectives = _collectives(target, layout, compiled)
    sent = {"model": sum((c["sent"] for c in collectives if c["axis"] == "model"), 0.0)}
    sent["data"] = sum((c["sent"] for c in collectives), 0.0) - sent["model"]
    times = {
        "arithmetic": best.compute_s,
        "memory": best.memory_s,
        "links": seconds_of_links(target, layout, sent["data"], sent["model"]),
    }
    step = max(times.values())
    tokens = run.data.batch * run.data.window
    hours = run.steps * step / 3600
    return {
        "run": run.name, "hash": run.hash, "target": target.name, "chip": target.kind, "chips": target.count,
        "compiler": compiler, "compiler_said": SAID[compiler].format(_version(compiler)),
        "mesh": layout.mesh, "accumulate": layout.accumulate, "remat": layout.remat, "unroll": unroll,
        "flags": layout.flags(unroll),
        "memory": {
            "parameters": compiled.parameters, "optimizer": compiled.optimizer, "teacher": compiled.teacher,
            "batch": compiled.batch, "temporaries": compiled.temporaries, "code": compiled.code,
            "peak": compiled.peak, "limit": _finite(chip.limit), "estimated_peak": best.memory,
        },
        "collectives": collectives,
        "estimated_sent": best.sent_data + best.sent_model,
        "flops": {"step": best.model_flops, "device": best.flops, "run": best.model_flops * run.steps},
        "intensity": {"memory": best.flops / best.moved, "links": best.flops / max(sum(sent.values()), 1.0)},
        "roofline_s": times, "bound": max(times, key=lambda name: times[name]), "step_s": step,
        "mfu_bound": best.model_flops / (chip.flops * chips * step),
        "tokens_per_s": tokens / step, "hours": hours, "chip_hours": hours * target.count,
        "warnings": [*_mistakes(run, target, layout), *compiled.warnings],
        "seconds": {"trace": compiled.trace_s, "lower": compiled.lower_s, "compile": compiled.compile_s},
    }  # fmt: skip


def _size(needed: float) -> str:
    return f"{needed / GIB:.2f} GiB" if needed == needed else "more"


def _finite(limit: float) -> float | None:
    return limit if limit < float("inf") else None


def _version(compiler: str) -> str:
    return importlib.metadata.version({"tpu": "libtpu"}.get(compiler, "jaxlib"))


def _collectives(target: Target, layout: Layout, compiled: Compiled) -> list[dict[str, Any]]:
    """Those of a kind, an axis and a link together: how often in a step, bytes that take part, bytes sent."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for c in compiled.collectives:
        axis = axis_of(c.group, layout.data, layout.model)
        stride = 1 if axis == "model" or len(c.group) < 2 else c.group[1] - c.group[0]
        link, speed = target.link(len(c.group), max(1, stride))
        key = (c.kind, axis, link)
        row = rows.setdefault(
            key, {"kind": c.kind, "axis": axis, "link": link, "count": 0, "bytes": 0.0, "sent": 0.0, "seconds": 0.0}
        )
        row["count"] += c.times
        row["bytes"] += c.times * c.bytes
        row["sent"] += c.sent
        row["seconds"] += c.sent / speed
    return sorted(rows.values(), key=lambda row: -row["sent"])


def _mistakes(run: Run, target: Target, layout: Layout) -> list[str]:
    said = []
    if (used := layout.data * layout.model) < target.count:
        said.append(
            f"{target.count - used} of {target.count} chips are idle: no mesh of more divides data.batch="
            f"{run.data.batch} and model.dim={run.model.dim}; a batch that is a multiple of {target.count} may"
        )
    if run.model.dtype == "float32" and target.chip.platform != "cpu":
        said.append("the model computes in float32, on which these rates do not hold; use --set model.dtype=bfloat16")
    if layout.remat == "none" and run.model.layers > 2 and layout.data > 1:
        said.append("without remat the gathered weights of all layers are kept for the backward pass")
    return said


def _unfit(run: Run, target: Target, best: Estimate, needed: float, how: str) -> InputError:
    """One line: by how much the run does not fit, and what would."""
    limit, ratio = target.chip.limit, max(needed / best.memory, 1e-9)
    over = f"{(needed - limit) / GIB:.1f} GiB more than" if needed == needed else "more than"
    text = (
        f"{run.name} does not fit {target.name}: {how}, {best.layout.flags()} needs {needed / GIB:.1f} GiB a chip, "
        f"{over} the {limit / GIB:.1f} that a program may use; "
    )
    taught = teacher_of(run)
    teacher = taught[0] if taught else None
    scale = ratio if needed == needed else 1.0
    here = [e for e in ranked(run, target, teacher) if e.memory * scale <= limit and e.layout != best.layout]
    if here and how == "compiled":
        return InputError(f"{text}{here[0].layout.flags()} would, by its estimate")
    for other in larger(target):
        fitting = [e for e in ranked(run, other, teacher) if e.memory * scale <= 0.9 * limit]
        if fitting:
            return InputError(f"{text}{other.name} with {fitting[0].layout.flags()} would, by its estimate")
    least = min(ranked(run, target, teacher), key=lambda e: e.memory)
    return InputError(f"{text}no larger target of {target.kind} would ({least.memory / GIB:.1f} GiB here at least)")


def tables(found: dict[str, Any]) -> list[Table]:
    """Memory, collectives and time of a finding, for a terminal."""
    memory, limit = found["memory"], found["memory"]["limit"]
    names = ("parameters", "optimizer", "teacher", "batch", "temporaries", "code", "peak")
    share = lambda bytes_: None if limit is None else bytes_ / limit  # noqa: E731
    unit, size = ("GiB", GIB) if memory["peak"] >= GIB else ("MiB", 2**20)
    bytes_table = Table(
        (Column("memory of a device"), Column(unit, ",.3f"), Column("of the chip", ".1%")),
        [[name, memory[name] / size, share(memory[name])] for name in names],
        f"{found['run']} on {found['target']}: {found['flags']}",
        [f"compiled in {found['seconds']['compile']:.1f} s by {found['compiler_said']}",
         f"estimated peak {memory['estimated_peak'] / size:.3f} {unit}"],
    )  # fmt: skip
    links = Table(
        (Column("collective"), Column("axis"), Column("link"), Column("a step", ",d"), Column(unit, ",.3f"),
         Column(f"{unit} sent", ",.3f"), Column("ms", ",.3g")),
        [[c["kind"], c["axis"], c["link"], c["count"], c["bytes"] / size, c["sent"] / size, 1e3 * c["seconds"]]
         for c in found["collectives"]],
        "collectives of a device, within loops as often as these turn",
    )  # fmt: skip
    times = found["roofline_s"]
    rows = [
        ["model FLOPs of a step", f"{found['flops']['step']:.3g}"],
        ["FLOPs of a device, remat included", f"{found['flops']['device']:.3g}"],
        ["FLOPs a byte of memory; of links", f"{found['intensity']['memory']:.0f}; {found['intensity']['links']:.0f}"],
        *([f"ms of {name}", f"{1e3 * seconds:.4g}"] for name, seconds in times.items()),
        ["roofline step", f"{1e3 * found['step_s']:.4g} ms, bound by {found['bound']}"],
        ["MFU at most", f"{found['mfu_bound']:.1%}"],
        ["tokens/s at most", f"{found['tokens_per_s']:,.0f}"],
        ["hours; chip-hours at least", f"{found['hours']:,.3g}; {found['chip_hours']:,.4g}"],
    ]
    warnings = [f"warning: {text}" for text in found["warnings"]]
    return [bytes_table, links, Table((Column("a step"), Column("")), rows, "roofline", warnings)]


def suggestion(run: Run, target: Target, count: int = 5) -> Table:
    """The best layouts by estimate, one a mesh and remat."""
    taught = teacher_of(run)
    chosen: dict[tuple, Estimate] = {}
    for e in ranked(run, target, taught[0] if taught else None):
        chosen.setdefault((e.layout.mesh, e.layout.remat), e)
    rows = [
        [e.layout.mesh, e.layout.accumulate, e.layout.remat, e.memory / GIB, 1e3 * e.step_s, e.bound]
        for e in list(chosen.values())[:count]
    ]
    columns = (Column("mesh"), Column("accumulate", "d"), Column("remat"), Column("GiB", ",.2f"),
               Column("roofline ms", ",.4g"), Column("bound by"))  # fmt: skip
    return Table(columns, rows, f"layouts of {run.name} on {target.name}, by estimate")
