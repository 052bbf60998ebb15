"""An analytic model of a training step: bytes of a device, bytes moved, time at the roofline. No compiler is asked.

Counted from shapes, for layouts to be ranked by; what the chosen layout really needs is then read off its compiled
program, and printed beside the estimate.
"""

import dataclasses
import itertools
import math
from typing import Literal, NamedTuple

from fbi.errors import InputError
from fbi.model.causal import blocks
from fbi.model.config import ModelConfig, count_parameters
from fbi.preflight.targets import Target
from fbi.train import mesh as meshes
from fbi.train.run import Execution, Run

Remat = Literal["none", "products", "full"]
REMATS: tuple[Remat, ...] = ("none", "products", "full")
LONGEST_MODEL_AXIS = 16  # tensor parallelism beyond it costs more than it saves at these widths
ROOM = 0.9  # of the memory, up to which an estimate is taken to fit


class Layout(NamedTuple):
    """How a step is spread and what it keeps."""

    data: int
    model: int
    accumulate: int = 1
    remat: Remat = "full"
    sequence: bool = False

    @property
    def mesh(self) -> str:
        """As `fbi train --mesh` takes it."""
        return f"data={self.data},model={self.model}"

    def execution(self, unroll: int = 1) -> Execution:
        """The execution of this layout."""
        return Execution(
            mesh=self.mesh,
            accumulate=self.accumulate,
            remat=self.remat != "none",
            remat_keeps="products" if self.remat == "products" else "nothing",
            sequence=self.sequence,
            unroll=unroll,
        )

    def flags(self, unroll: int = 1) -> str:
        """The flags of `fbi train` for this layout."""
        remat = {"none": "", "full": " --remat True", "products": " --remat True --remat-keeps products"}[self.remat]
        split = " --sequence True" if self.sequence else ""
        return f"--mesh {self.mesh} --accumulate {self.accumulate}{remat}{split} --unroll {unroll}"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A step in one layout. Bytes and operations of one device and step."""

    layout: Layout
    parameters: float
    optimizer: float
    teacher: float
    temporaries: float
    """Gradients, activations, logits, weights while they are whole."""
    model_flops: float
    """Of all devices: three passes, the teacher's forward pass, attention in full; remat aside."""
    flops: float
    """Of one device, what remat repeats included."""
    moved: float
    """To and from its memory."""
    sent_data: float
    sent_model: float
    compute_s: float
    memory_s: float
    link_s: float

    @property
    def memory(self) -> float:
        """Bytes at the peak."""
        return self.parameters + self.optimizer + self.teacher + self.temporaries

    @property
    def step_s(self) -> float:
        """Seconds at the roofline: the slowest of arithmetic, memory and links, the others hidden behind it."""
        return max(self.compute_s, self.memory_s, self.link_s)

    @property
    def bound(self) -> str:
        """What that is."""
        times = {"arithmetic": self.compute_s, "memory": self.memory_s, "links": self.link_s}
        return max(times, key=lambda name: times[name])


def seconds_of_links(target: Target, layout: Layout, sent_data: float, sent_model: float) -> float:
    """Seconds that the bytes take which a device sends over each axis of the mesh, one after the other."""
    data, model = target.link(layout.data, layout.model)[1], target.link(layout.model)[1]
    return sent_data / data + sent_model / model


def step_flops(run: Run, teacher: ModelConfig | None) -> tuple[float, float, float]:
    """Operations of one step: forward of the student, of that its attention products, forward of the teacher.

    Two for a multiply-add, every pair of positions in the attention, as `fbi.analysis.cost` counts.
    """
    sequences = 2.0 * run.data.batch
    forward, attention = _macs(run.model, run.data.window)
    taught = _macs(teacher, run.data.window)[0] if teacher else 0
    return sequences * forward, sequences * attention, sequences * taught


def _macs(config: ModelConfig, tokens: int) -> tuple[int, int]:
    """Multiply-adds of a forward pass over one sequence, and those of the attention among them."""
    attention = 2 * config.layers * config.heads * config.head_dim * tokens**2
    return tokens * (count_parameters(config).linear + config.vocab * config.dim) + attention, attention


def estimate(run: Run, layout: Layout, target: Target, teacher: ModelConfig | None = None) -> Estimate:
    """The estimate for `run` in `layout` on `target`; `teacher` is the teacher's shape where the run has one.

    Per layer and token, in bytes of the compute type: the stream and norms 4 dim, heads and MLP over the model axis, as
    is the stream (not what norms make of it) with `sequence`; the scores of one block of queries, their exponentials
    and gradients, in float32 (3 x heads x window). Logits in float32, their gradient in the compute type. Without remat
    every layer keeps all that but the scores, and its gathered weights; with `products` the results of its products;
    with `full` its input alone.
    """
    c, d, m = run.model, layout.data, layout.model
    size = {"float32": 4, "bfloat16": 2, "float64": 8}[c.dtype]
    wide = max(size, 4)
    counts, devices = count_parameters(c), d * m
    tokens = run.data.batch // (layout.accumulate * d) * run.data.window  # of a part, on a device
    block = counts.linear / c.layers / m  # weights of a layer, whole but for the model axis
    table = counts.embedding + counts.head

    heads = (2 * c.heads + 2 * c.kv_heads) * c.head_dim / m
    gates = (3 if c.gated else 2) * c.ff / m
    cut = len(blocks(run.data.window))
    square = wide * c.heads / m * run.data.window
    scores = 3 * square / cut
    stream = c.dim / (m if layout.sequence else 1)
    live = size * (2 * c.dim + 2 * stream + heads + gates) + scores
    kept = {
        "full": 0.0,
        "products": size * (heads + (gates - c.ff / m) + 2 * stream),
        "none": live - scores,
    }[layout.remat]
    weights = size * counts.linear / m if layout.remat == "none" else 0.0
    logits = (wide + size) * c.vocab / m
    parameters = wide * counts.total / devices
    gradients = (1 if layout.accumulate == 1 else 2) * parameters
    gathered = 2 * size * block + 2 * size * (counts.embedding + counts.head / m)
    held = taught = 0.0
    if teacher:
        known = count_parameters(teacher)
        held = wide * known.total / devices
        logits += wide * c.vocab / m
        gathered += 2 * size * known.linear / teacher.layers / m + size * (known.embedding + known.head / m)
        taught = known.total
    at_once = max(live, logits)  # the backward pass of the layers begins when that of the head has ended
    temporaries = tokens * (c.layers * (size * stream + kept) + at_once) + weights + gradients + gathered

    forward, attention, of_teacher = step_flops(run, teacher)
    head = 2.0 * run.data.batch * run.data.window * c.vocab * c.dim  # which remat does not repeat
    again = {"none": 0.0, "products": attention, "full": forward - head}
    flops = (3 * forward + of_teacher + again[layout.remat]) / devices
    parts, passes = layout.accumulate, {"none": 3, "products": 3.5, "full": 4}[layout.remat]
    read = 4 * square * (cut + 1) / (2 * cut)  # of the scores those up to a block's end, there and back
    streams = passes * c.layers * (size * (8 * c.dim + 2 * heads + 2 * gates) + read) + 2 * logits
    moved = parts * (tokens * streams + 6 * size * (counts.linear + table) / m + 2 * size * taught / m) + 9 * parameters

    # FSDP gathers each weight for the forward and the backward pass, and scatters the sum of its gradients: compilers
    # for TPU and GPU make a reduce-scatter of the sum of which each device keeps its share (the CPU's does not).
    share, across = (d - 1) / d, (m - 1) / m
    gathers = (1 if layout.remat == "none" else 2) * counts.linear + table
    sent_data = parts * share * size * (gathers + counts.linear + table + taught) / m
    turns = c.layers * (4 + (0 if layout.remat == "none" else 2)) + (2 * teacher.layers if teacher else 0)
    sent_model = parts * 2 * across * turns * tokens * size * c.dim
    chip = target.chip
    return Estimate(
        layout=layout,
        parameters=parameters,
        optimizer=2 * parameters,
        teacher=held,
        temporaries=temporaries,
        model_flops=3 * forward + of_teacher,
        flops=flops,
        moved=moved,
        sent_data=sent_data,
        sent_model=sent_model,
        compute_s=flops / chip.flops,
        memory_s=moved / chip.bandwidth,
        link_s=seconds_of_links(target, layout, sent_data, sent_model),
    )


def divides(run: Run, layout: Layout, teacher: ModelConfig | None = None) -> bool:
    """Whether the layout divides everything that it splits."""
    sizes = {"data": layout.data, "model": layout.model}
    try:
        meshes.check(sizes, run.model, run.data.batch, layout.accumulate)
        if teacher:
            meshes.check(sizes, teacher, run.data.batch, layout.accumulate, "teacher")
    except InputError:
        return False
    return True


def layouts(run: Run, target: Target, teacher: ModelConfig | None = None) -> list[Layout]:
    """Every layout that divides the run and leaves the fewest chips idle."""
    parts = [n for n in range(1, run.data.batch + 1) if run.data.batch % n == 0]
    for used in range(target.count, 0, -1):
        found = [
            Layout(used // model, model, accumulate, remat)
            for model, accumulate, remat in itertools.product(
                [n for n in range(1, LONGEST_MODEL_AXIS + 1) if used % n == 0], parts, REMATS
            )
            if run.data.batch % (used // model * accumulate) == 0
            and divides(run, Layout(used // model, model, accumulate, remat), teacher)
        ]
        if found:
            return found
    raise InputError(
        f"no mesh divides data.batch={run.data.batch} and model.dim={run.model.dim}; even one device would not do"
    )


def ranked(
    run: Run, target: Target, teacher: ModelConfig | None = None, given: list[Layout] | None = None
) -> list[Estimate]:
    """Layouts (by default all that divide), the best first.

    Those whose estimate fits come first, by the time of a step, then by memory where times agree within a twentieth;
    then the rest, by memory.
    """
    limit = ROOM * target.chip.limit

    def order(found: Estimate) -> tuple[float, ...]:
        if found.memory > limit:
            return (1.0, found.memory, 0.0, 0.0)
        return (0.0, float(round(20 * _log(found.step_s))), float(found.layout.accumulate), found.memory)

    chosen = layouts(run, target, teacher) if given is None else given
    return sorted((estimate(run, layout, target, teacher) for layout in chosen), key=order)


def _log(seconds: float) -> float:
    return math.log(max(seconds, 1e-12))
