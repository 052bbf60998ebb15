"""The BitNet family: b1, b1.58, a4.8, v2, and low-bit keys and values."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fbi.errors import InputError
from fbi.quant.field import Affine, Field, spread
from fbi.quant.grid import Binary, Integers, Levels
from fbi.quant.methods.baselines import Bits, Rule, absmax
from fbi.quant.methods.quest import fp4_levels
from fbi.quant.quantizer import Quantizer, compose, warmed
from fbi.quant.registry import ACTIVATION, BOTH, CONTRACTION_AXIS, Choices, method
from fbi.quant.scale import LEAST, QParams, Scale, kept_shape, max_abs, mean_abs, reduced_axes, statistic
from fbi.quant.sparse import TopShare
from fbi.quant.ste import Ctx
from fbi.quant.surrogate import Name, identity
from fbi.quant.surrogate import surrogate as by_name
from fbi.quant.transform import IDENTITY, Hadamard


def _b1_scale(count: int, *, gradient_one: bool) -> Scale:
    """mean|W| beside sign(W - mean W), over `count` blocks of outputs: BitNet, arXiv 2310.11453, eq. 1 to 3 and 12."""

    def over_blocks(x: Float[Array, "i o"]) -> Float[Array, "1 n"]:
        if x.shape[1] % count:
            fitting = max(n for n in range(1, count) if x.shape[1] % n == 0)
            raise InputError(f"bitnet-b1:groups={count} does not divide {x.shape[1]} outputs; use groups={fitting}")
        return jnp.mean(x.reshape(x.shape[0], count, -1), (0, 2))[None, :]

    def solve(x: Float[Array, "i o"], qparams: QParams, ctx: Ctx) -> tuple[Array, Field]:
        del qparams, ctx
        fixed = jax.lax.stop_gradient(x)
        beta = over_blocks(jnp.abs(fixed)) + LEAST
        moved = x - spread(over_blocks(fixed), x.shape)
        return moved / spread(beta, x.shape) if gradient_one else moved, Affine(beta)

    return Scale(lambda x: {}, solve, lambda shape: [(1, count)])


@method(
    "bitnet-b1",
    roles=BOTH,
    paper="BitNet, arXiv 2310.11453, eq. 1 to 5 and 12",
    choices=Choices(
        "mean|W| of the uncentred matrix (or group of outputs); activations max|x| of the tensor or token",
        "binary; activations 2^bits integers",
        "identity",
        transform="centring",
        notes="sign(0) = +1 (paper: -1); rule=code passes gradient one to W, the paper's chain the scale",
    ),
)
def bitnet_b1(
    role: str,
    *,
    bits: Bits = 8,
    groups: int = 1,
    granularity: Literal["tensor", "token"] = "tensor",
    rule: Rule = "paper",
) -> Quantizer:
    """Weights mean|W| sign(W - mean W); activations (g / Q) RoundClip(Q / g x, -Q, Q - 1), g = max|x|, Q = 2^(bits-1).

    `groups` splits the outputs into blocks with statistics of their own, as model parallelism does without
    communication. Activations: `tensor` as the paper trains, `token` as it infers.
    """
    axis = CONTRACTION_AXIS[role]
    if role == "activation":
        top = 2 ** (bits - 1)
        scale = statistic(max_abs, {"token": "output"}.get(granularity, granularity), axis, top=top)
        return compose(scale=scale, grid=Integers(-top, top - 1), surrogate=identity, axis=axis)
    if groups < 1:
        raise InputError(f"bitnet-b1:groups={groups} must be at least 1")
    scale = _b1_scale(groups, gradient_one=rule == "code")
    return compose(scale=scale, grid=Binary(), surrogate=identity, axis=axis)


@method(
    "bitnet-b158",
    roles=BOTH,
    paper="BitNet b1.58, arXiv 2402.17764, equations 1 to 3",
    choices=Choices(
        "mean|W| of the matrix; activations max|x| per token",
        "ternary; activations 8-bit integers",
        "identity",
        notes="rule=code guards the scale with max(s, 1e-5), the paper adds an epsilon; warmup is the lambda of "
        "1.58-bit fine-tuning",
    ),
)
def bitnet_b158(role: str, *, rule: Rule = "paper", surrogate: Name = "identity", warmup: float = 0.0) -> Quantizer:
    """Ternary weights s RoundClip(w / s, -1, 1) with s = mean|w| of the matrix; as an activation, absmax:bits=8.

    `rule` guards s against zero: the paper adds an epsilon, the published training code takes max(s, 1e-5).
    `warmup`: share of training over which the rounding is phased in, for a start from full-precision weights.
    """
    if not 0 <= warmup <= 1:
        raise InputError(f"bitnet-b158:warmup={warmup} is a share of training; it must be between 0 and 1")
    if role == "activation":
        return warmed(absmax(role, rule=rule, surrogate=surrogate), warmup)
    axis = CONTRACTION_AXIS[role]
    scale = statistic(mean_abs, "tensor", axis, rule=rule)
    return warmed(compose(scale=scale, grid=Integers(-1, 1), surrogate=by_name(surrogate), axis=axis), warmup)


def absmean_int4(axis: int, *, back: bool = True, block: int = 0) -> Quantizer:
    """beta / sqrt 7 RoundClip(sqrt 7 / beta x, -8, 7), beta = mean|x| per token: BitNet a4.8, 2411.04965, eq. 4."""
    scale = statistic(mean_abs, "output", axis, top=7**0.5)
    transform = Hadamard(block) if block else IDENTITY
    return compose(scale=scale, grid=Integers(-8, 7), surrogate=identity, axis=axis, transform=transform, back=back)


@method(
    "bitnet-a4",
    roles=BOTH,
    paper="BitNet a4.8, arXiv 2411.04965, eq. 2 to 5",
    choices=Choices("mean|x| per token (FP4: max|x|)", "4-bit integers or E2M1; weights ternary", "identity"),
)
def bitnet_a4(role: str, *, format: Literal["int4", "fp4"] = "int4") -> Quantizer:
    """The inputs of attention and MLP in 4 bits; as a weight, bitnet-b158."""
    if role == "weight":
        return bitnet_b158(role)
    axis = CONTRACTION_AXIS[role]
    if format == "int4":
        return absmean_int4(axis)
    scale = statistic(max_abs, "output", axis, top=6)
    return compose(scale=scale, grid=Levels(fp4_levels()), surrogate=identity, axis=axis)


@method(
    "bitnet-topk",
    roles=ACTIVATION,
    paper="BitNet a4.8, arXiv 2411.04965, section 2.2 (input of the output projection)",
    choices=Choices(
        "max|x| per token",
        "8-bit integers",
        "identity, through the mask too",
        transform="largest half of each token",
        notes="the axis of the share is not printed; per token here",
    ),
)
def bitnet_topk(role: str, *, bits: Bits = 8, share: float = 0.5) -> Quantizer:
    """absmax integers of the entries of largest magnitude of each token, zero elsewhere."""
    if not 0 < share <= 1:
        raise InputError(f"bitnet-topk:share={share} must be above 0 and at most 1")
    axis, top = CONTRACTION_AXIS[role], 2 ** (bits - 1) - 1
    grid = TopShare(Integers(-top - 1, top), share, axis)
    return compose(scale=statistic(max_abs, "output", axis, top=top), grid=grid, surrogate=identity, axis=axis)


@method(
    "bitnet-v2",
    roles=BOTH,
    paper="BitNet v2, arXiv 2504.18415, eq. 1 to 5",
    choices=Choices(
        "mean|x| (4 bits) or max|x| (8 bits) per token; weights mean|W|",
        "integers; weights ternary",
        "identity",
        transform="Hadamard over the whole width, online; weights are learned in that basis",
    ),
)
def bitnet_v2(role: str, *, bits: Literal[4, 8] = 4, block: int = -1) -> Quantizer:
    """H-BitLinear, for the output and down projections: the input is rotated, then quantized, and stays rotated."""
    if role == "weight":
        return bitnet_b158(role)
    axis = CONTRACTION_AXIS[role]
    if bits == 4:
        return absmean_int4(axis, back=False, block=block)
    scale = statistic(max_abs, "output", axis, top=127)
    rotation = Hadamard(block)
    return compose(scale=scale, grid=Integers(-128, 127), surrogate=identity, axis=axis, transform=rotation, back=False)


@method(
    "bitnet-kv",
    roles=ACTIVATION,
    paper="BitNet a4.8, arXiv 2411.04965, section 2.2 (low-bit attention)",
    choices=Choices(
        "max|x| per token and head, after the rotary positions",
        "integers; the first token in 4 bits",
        "identity",
        notes="for the sites layers.*.attn.kv; the paper says unsigned integers but prints no zero-point: signed here",
    ),
)
def bitnet_kv(role: str, *, bits: Bits = 3, first: Bits = 4) -> Quantizer:
    """Keys and values in few bits, those of the first position of a sequence in `first` bits."""
    axis, narrow, wide = CONTRACTION_AXIS[role], 2 ** (bits - 1) - 1, 2 ** (first - 1) - 1

    def solve(x: Float[Array, "..."], qparams: QParams, ctx: Ctx) -> tuple[Array, Field]:
        del qparams
        s = max_abs(jax.lax.stop_gradient(x), (x.ndim - 1,)) + LEAST
        top: Array | float = narrow
        if ctx.positions is not None:
            rows = (1, -1) + (1,) * (x.ndim - 2)
            top = jnp.where(ctx.positions == 0, wide, narrow).astype(x.dtype).reshape(rows)
        return x * (top / s), Affine(s / top)

    def shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [kept_shape(shape, reduced_axes("output", len(shape), axis))]

    top = max(narrow, wide)
    scale = Scale(lambda x: {}, solve, shapes)
    return compose(scale=scale, grid=Integers(-top - 1, top), surrogate=identity, axis=axis)
