"""Binary and ternary networks before language models: BinaryConnect to ReSTE."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fbi.quant.around import NOTHING, Around, prelu_shifted
from fbi.quant.field import Affine, Field, TwoSided, Unit
from fbi.quant.grid import Binary, Grid, Integers, Stochastic
from fbi.quant.methods.baselines import Granularity, Rounding
from fbi.quant.quantizer import Quantizer, compose
from fbi.quant.registry import BOTH, CONTRACTION_AXIS, WEIGHT, Choices, method
from fbi.quant.scale import (
    LEAST,
    Axes,
    QParams,
    Scale,
    magnitude,
    max_abs,
    mean_abs,
    reduced_axes,
    safe,
    shaped,
    unitless,
)
from fbi.quant.ste import Ctx
from fbi.quant.surrogate import Clip, Name, Surrogate, identity, regraded
from fbi.quant.surrogate import surrogate as by_name

BINARY = Binary()


def plain_sign(surrogate: Surrogate, axis: int, grid: Grid = BINARY) -> Quantizer:
    """sign(x) without a scale."""
    return compose(scale=unitless(), grid=grid, surrogate=surrogate, axis=axis)


def scaled_sign(surrogate: Surrogate, axis: int, *, centred: bool = False, around: Around = NOTHING) -> Quantizer:
    """mean|w| sign(w) per output of a weight; `centred` takes the mean off w, not off its magnitude."""
    scale = magnitude(mean_abs, "output", axis, centred=centred)
    return compose(scale=scale, grid=Binary(), surrogate=surrogate, axis=axis, around=around)


@method(
    "binaryconnect",
    roles=BOTH,
    paper="BinaryConnect, arXiv 1511.00363, eq. 1 and 2; BNN, 1602.02830, eq. 4",
    choices=Choices("none", "binary", "clip", around="optimizer: latent_clip=1"),
)
def binaryconnect(role: str, *, rounding: Rounding = "nearest", surrogate: Name = "clip") -> Quantizer:
    """sign(w); `stochastic`: +1 with probability clip((w + 1) / 2, 0, 1) in training."""
    grid = Stochastic(Binary(), width=2.0) if rounding == "stochastic" else Binary()
    return plain_sign(by_name(surrogate), CONTRACTION_AXIS[role], grid)


def _xnor_scale(axis: int) -> Scale:
    """mean|w| per output, dL/dw = dL/dw_hat (1/n + a 1{|w| <= 1}): XNOR-Net, arXiv 1603.05279, section 3.1."""

    def solve(x: Float[Array, "..."], qparams: QParams, ctx: Ctx) -> tuple[Array, Field]:
        del qparams, ctx
        fixed = jax.lax.stop_gradient(x)
        alpha = mean_abs(fixed, reduced_axes("output", x.ndim, axis)) + LEAST
        slope = (jnp.abs(fixed) <= 1) + 1 / (x.shape[axis] * alpha)
        return regraded(x, slope), Affine(alpha)

    return Scale(lambda x: {}, solve, shaped("output", axis))


@method(
    "xnor",
    roles=BOTH,
    paper="XNOR-Net, arXiv 1603.05279, eq. 6 and section 3.1",
    choices=Choices(
        "mean|w| per output; activations mean|x| per token",
        "binary",
        "clip, plus 1/n for the scale's own derivative",
        notes="the published code also centres the weights and rescales the gradient for SGD: neither is in the paper",
    ),
)
def xnor(role: str) -> Quantizer:
    """mean|w| sign(w); as an activation mean|x| sign(x)."""
    axis = CONTRACTION_AXIS[role]
    if role == "activation":
        return scaled_sign(Clip(), axis)
    return compose(scale=_xnor_scale(axis), grid=Binary(), surrogate=identity, axis=axis)


@method(
    "bwn",
    roles=WEIGHT,
    paper="Binary-Weight-Networks of XNOR-Net, arXiv 1603.05279, section 3.1",
    choices=Choices("mean|w| per output", "binary", "clip, plus 1/n for the scale's own derivative"),
)
def bwn(role: str) -> Quantizer:
    """xnor with full-precision activations."""
    return xnor(role)


def _above(x: Float[Array, "..."], threshold: Float[Array, "..."], axes: Axes) -> Float[Array, "..."]:
    """The mean of |x| over the entries above the threshold."""
    above = jnp.abs(x) > threshold
    return jnp.sum(jnp.where(above, jnp.abs(x), 0), axes, keepdims=True) / jnp.maximum(
        jnp.sum(above, axes, keepdims=True), 1
    )


def _twn_scale(granularity: str, axis: int) -> Scale:
    def solve(x: Float[Array, "..."], qparams: QParams, ctx: Ctx) -> tuple[Array, Field]:
        del qparams, ctx
        axes, fixed = reduced_axes(granularity, x.ndim, axis), jax.lax.stop_gradient(x)
        threshold = 0.7 * mean_abs(fixed, axes) + LEAST
        alpha = _above(fixed, threshold, axes) + LEAST
        # A unit of half is the threshold; dL/dw = dL/dw_hat, as the paper updates.
        return regraded(x / (2 * threshold), 2 * threshold / alpha), Affine(alpha)

    return Scale(lambda x: {}, solve, shaped(granularity, axis))


@method(
    "twn",
    roles=WEIGHT,
    paper="TWN, arXiv 1605.04711, eq. 3 to 6",
    choices=Choices("mean of |w| above the threshold 0.7 mean|w|", "ternary", "identity"),
)
def twn(role: str, *, granularity: Granularity = "tensor") -> Quantizer:
    """Ternary weights with the threshold 0.7 mean|w| and the scale that fits what lies above it."""
    axis = CONTRACTION_AXIS[role]
    return compose(scale=_twn_scale(granularity, axis), grid=Integers(-1, 1), surrogate=identity, axis=axis)


def _ttq_scale(axis: int) -> Scale:
    """Learned scales of the positive and the negative side: TTQ, arXiv 1612.01064, eq. 6 to 8."""

    def threshold(x: Float[Array, "..."]) -> Float[Array, "..."]:
        return 0.05 * max_abs(jax.lax.stop_gradient(x), tuple(range(x.ndim))) + LEAST

    def init(x: Float[Array, "..."]) -> QParams:
        start = _above(x, threshold(x), tuple(range(x.ndim)))
        return {"positive": jnp.maximum(start, LEAST), "negative": jnp.maximum(start, LEAST)}

    def solve(x: Float[Array, "..."], qparams: QParams, ctx: Ctx) -> tuple[Array, Field]:
        del ctx
        positive, negative = (safe(qparams[name].astype(x.dtype)) for name in ("positive", "negative"))
        least, fixed = threshold(x), jax.lax.stop_gradient(x)
        # dL/dw is W_p, 1 or W_n times dL/dw_hat (eq. 8); the field multiplies a zero's by W_p, which is undone here.
        zero = jnp.where(jnp.abs(fixed) <= least, 1 / jax.lax.stop_gradient(positive), 1)
        return regraded(x / (2 * least), 2 * least * zero), TwoSided(positive, negative)

    return Scale(init, solve, shaped("tensor", axis, 2))


@method(
    "ttq",
    roles=WEIGHT,
    paper="TTQ, arXiv 1612.01064, eq. 6 to 9",
    choices=Choices("learned, one for each sign", "ternary, threshold 0.05 max|w|", "W_p, 1, W_n by zone"),
)
def ttq(role: str) -> Quantizer:
    """W_p, 0 or -W_n with the threshold 0.05 max|w|, W_p and W_n learned."""
    axis = CONTRACTION_AXIS[role]
    return compose(scale=_ttq_scale(axis), grid=Integers(-1, 1), surrogate=identity, axis=axis)


@method(
    "bireal",
    roles=BOTH,
    paper="Bi-Real Net, arXiv 1808.00278, eq. 7 and 9",
    choices=Choices("mean|w| per output", "binary", "clip, magnitude-aware; activations approxsign"),
)
def bireal(role: str, *, surrogate: Name = "approxsign") -> Quantizer:
    """mean|w| sign(w) with the magnitude-aware gradient; activations sign(x) with `surrogate`."""
    axis = CONTRACTION_AXIS[role]
    return scaled_sign(Clip(), axis) if role == "weight" else plain_sign(by_name(surrogate), axis)


def _irnet_scale(axis: int) -> Scale:
    """Weights standardised per output, with the gradient through it; scale the nearest power of two of mean|w'|."""

    def solve(x: Float[Array, "..."], qparams: QParams, ctx: Ctx) -> tuple[Array, Field]:
        del qparams, ctx
        axes = reduced_axes("output", x.ndim, axis)
        centred = x - jnp.mean(x, axes, keepdims=True)
        # Through a deviation of zero no gradient flows; without the guard its square root would have an infinite one.
        top = jax.lax.stop_gradient(jnp.max(jnp.abs(centred), axes, keepdims=True)) + LEAST
        scaled = centred / top
        standard = scaled / jnp.sqrt(jnp.mean(jnp.square(scaled), axes, keepdims=True) + 1e-10)
        size = jax.lax.stop_gradient(mean_abs(standard, axes)) + LEAST
        return standard, Affine(2.0 ** jnp.round(jnp.log2(size)))

    return Scale(lambda x: {}, solve, shaped("output", axis))


@method(
    "irnet",
    roles=BOTH,
    paper="IR-Net, arXiv 1909.10788, eq. 6 to 13",
    choices=Choices(
        "power of two of the standardised weights, per output",
        "binary",
        "ede",
        transform="standardisation, with its gradient",
        notes="t from 0.1 as in the paper; its code starts at 0.001",
    ),
)
def irnet(role: str, *, surrogate: Name = "ede") -> Quantizer:
    """2^round(log2 mean|w'|) sign(w') of the standardised w'; activations sign(x)."""
    axis = CONTRACTION_AXIS[role]
    if role == "activation":
        return plain_sign(by_name(surrogate), axis)
    return compose(scale=_irnet_scale(axis), grid=Binary(), surrogate=by_name(surrogate), axis=axis)


def learned_threshold(axis: int) -> Scale:
    """RSign's units x - b, b learned per channel: ReActNet, arXiv 2003.03488, eq. 5; started at the channel's mean."""

    def init(x: Float[Array, "..."]) -> QParams:
        return {"beta": jnp.mean(x, reduced_axes("input", x.ndim, axis), keepdims=True)}

    def solve(x: Float[Array, "..."], qparams: QParams, ctx: Ctx) -> tuple[Array, Field]:
        del ctx
        return x - qparams["beta"].astype(x.dtype), Unit(jnp.zeros((0,), x.dtype))

    return Scale(init, solve, lambda shape: [])


@method(
    "reactnet",
    roles=BOTH,
    paper="ReActNet, arXiv 2003.03488, eq. 5 and 6",
    choices=Choices(
        "mean|w| per output; activations a learned threshold per channel (RSign)",
        "binary",
        "clip; activations approxsign",
        around="RPReLU; loss: kl",
    ),
)
def reactnet(role: str, *, surrogate: Name = "approxsign") -> Quantizer:
    """mean|w| sign(w) with RPReLU after the product; activations sign(x - b), b learned per channel."""
    axis = CONTRACTION_AXIS[role]
    if role == "activation":
        return compose(scale=learned_threshold(axis), grid=Binary(), surrogate=by_name(surrogate), axis=axis)
    return scaled_sign(Clip(), axis, around=prelu_shifted())


@method(
    "bnnplus",
    roles=BOTH,
    paper="BNN+, arXiv 1812.11800, eq. 5 to 7",
    choices=Choices("mean|w| per output", "binary", "swishsign"),
)
def bnnplus(role: str, *, surrogate: Name = "swishsign") -> Quantizer:
    """mean|w| sign(w), activations sign(x), with the derivative of SwishSign."""
    axis = CONTRACTION_AXIS[role]
    chosen = by_name(surrogate)
    return scaled_sign(chosen, axis) if role == "weight" else plain_sign(chosen, axis)


@method(
    "reste",
    roles=BOTH,
    paper="ReSTE, arXiv 2308.06689, eq. 8",
    choices=Choices("mean|w| per output", "binary", "reste"),
)
def reste(role: str, *, surrogate: Name = "reste") -> Quantizer:
    """mean|w| sign(w), activations sign(x), with the derivative of the power function |u|^(1/o), o from 1 to 3."""
    axis = CONTRACTION_AXIS[role]
    chosen = by_name(surrogate)
    return scaled_sign(chosen, axis) if role == "weight" else plain_sign(chosen, axis)
