"""QuEST: Hadamard rotation, RMS scale with the Gaussian-optimal grid, trust gradient."""

from typing import Annotated, Literal

from fbi.errors import InputError
from fbi.quant import gaussian
from fbi.quant.grid import Grid, HalfIntegers, Integers, Levels
from fbi.quant.quantizer import Quantizer, compose
from fbi.quant.registry import BOTH, CONTRACTION_AXIS, Choices, method
from fbi.quant.scale import rms, statistic
from fbi.quant.sparse import PairSparse
from fbi.quant.surrogate import Clip, Surrogate, Trust, identity
from fbi.quant.transform import IDENTITY, Hadamard

QuestBits = Annotated[float, (1, 1.58, 2, 3, 4, 5, 6, 7, 8)]
Shape = Literal["uniform", "fp4", "lloyd"]
ONE_BIT_CLIP = {True: 1.30, False: 1.25}  # with and without rotation


def fp4_levels() -> tuple[float, ...]:
    """The 15 values of E2M1, rising."""
    return (*(-x for x in gaussian.FP4[:0:-1]), *gaussian.FP4)


def _grid(bits: float | int, levels: Shape, alpha: float) -> tuple[Grid, float]:
    """The grid, and how many of its units make one RMS."""
    if levels == "fp4":
        if bits != 4:
            raise InputError(f"quest:levels=fp4 has 4 bits, not bits={bits}; drop bits")
        return Levels(fp4_levels()), 1 / gaussian.FP4_UNIT
    if levels == "lloyd":
        if bits not in gaussian.LLOYD:
            raise InputError(f"quest:levels=lloyd,bits={bits} is not available; allowed bits: 1|2|3|4")
        upper = gaussian.LLOYD[int(bits)]
        return Levels((*(-x for x in reversed(upper)), *upper)), 1.0
    if bits == 1.58:
        return Integers(-1, 1), 1 / alpha
    return HalfIntegers.of(int(bits)), (2 ** int(bits) - 1) / (2 * alpha)


def _surrogate(name: str, clip: float, bits: float | int, levels: Shape, clips: str, rotated: bool) -> Surrogate:
    if name == "auto":
        name = "clip" if bits == 1 else "trust"
    if name == "clip":
        return Clip(clip or (ONE_BIT_CLIP[rotated] if bits == 1 else 1.0))
    if name == "trust" and levels == "fp4" and clips == "published":
        return Trust(gaussian.FP4_PUBLISHED_RADIUS / gaussian.FP4_UNIT)
    return {"trust": Trust(), "identity": identity}[name]


@method(
    "quest",
    roles=BOTH,
    paper="QuEST, arXiv 2502.05003, eq. 1 to 3 and section 3",
    choices=Choices(
        "Gaussian-optimal multiple of the RMS of the row",
        "mid-rise; ternary, FP4, Lloyd-Max by option",
        "trust; at 1 bit clip at 1.30 (1.25 without rotation)",
        transform="block Hadamard; 4:8 pair mask by option",
        notes="published: constants off by up to 1 % (clips=published), 1.58 bits with four levels, an FP4 trust "
        "radius of 0.319 (0.487 by the paper's rule), weight-only layers that never rotate the input (rotate=stay)",
    ),
)
def quest(
    role: str,
    *,
    bits: QuestBits = 4.0,
    block: int = 128,
    rotate: Literal["auto", "stay", "back"] = "auto",
    surrogate: Literal["auto", "trust", "clip", "identity"] = "auto",
    clip: float = 0.0,
    levels: Shape = "uniform",
    sparsity: Literal["none", "4:8"] = "none",
    clips: Literal["optimal", "published"] = "optimal",
) -> Quantizer:
    """Rotate in blocks, divide by the RMS of the row, snap to the grid of least Gaussian error, mask by trust.

    `block=0`: no rotation. `rotate`: `back` always undoes the rotation, `stay` never does, `auto` leaves it when the
    layer's other operand is rotated alike. `clip` is the outer clip in units of the grid's reach (0: 1.30 or 1.25 at
    1 bit, else 1). `sparsity=4:8` keeps two of four neighbouring pairs of a weight.
    """
    axis = CONTRACTION_AXIS[role]
    if clip < 0:
        raise InputError(f"quest:clip={clip} must not be negative; 0 is the default of the bit-width")
    alpha = (gaussian.OPTIMAL if clips == "optimal" else gaussian.PUBLISHED)[bits]
    grid, per_rms = _grid(bits, levels, alpha)
    chosen = _surrogate(surrogate, clip, bits, levels, clips, rotated=block != 0)
    if sparsity == "4:8":
        if not isinstance(grid, HalfIntegers):
            raise InputError(
                f"quest:sparsity=4:8 needs the uniform grid and whole bits, not levels={levels},bits={bits}"
            )
        grid = PairSparse(grid, axis)
    built = compose(
        scale=statistic(rms, "output", axis, top=per_rms),
        grid=grid,
        surrogate=chosen,
        axis=axis,
        transform=Hadamard(block) if block else IDENTITY,
        back=rotate != "stay",
        whole=sparsity != "none",
    )
    return built._replace(turned=None) if rotate == "back" else built
