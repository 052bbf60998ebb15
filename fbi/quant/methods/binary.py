"""Binary weights whose scales are learned or solved: FBI-LLM, OneBit, BinaryMoS, AdaBin, DB-LLM."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fbi.errors import InputError
from fbi.quant.around import output_norm, rank_one, scale_experts
from fbi.quant.field import Affine, Dual, Field, RankOne, groups, spread
from fbi.quant.grid import Binary, Integers
from fbi.quant.methods.baselines import Granularity, Rule
from fbi.quant.quantizer import Quantizer, compose
from fbi.quant.registry import BOTH, CONTRACTION_AXIS, WEIGHT, Choices, method
from fbi.quant.scale import LEAST, QParams, Scale, deviation, fitted_sign, reduced_axes, safe, shaped, unitless
from fbi.quant.ste import Ctx
from fbi.quant.surrogate import Name, identity
from fbi.quant.surrogate import surrogate as by_name


@method(
    "fbi",
    roles=WEIGHT,
    paper="FBI-LLM, arXiv 2407.07093, section 3.1",
    choices=Choices(
        "learned alpha and beta per input feature",
        "binary",
        "identity",
        around="loss: ad (autoregressive distillation)",
        notes="sign(0) = +1, where the paper maps zero to -1 and the published code to 0",
    ),
)
def fbi(
    role: str,
    *,
    granularity: Granularity = "input",
    shift: bool = True,
    frozen: bool = False,
    surrogate: Name = "identity",
) -> Quantizer:
    """Binary weights alpha * sign(w) + beta, alpha and beta learned.

    One pair per input feature ("column" in the paper) by default; dL/dw = alpha dL/dw_hat, without a clip.
    sign(0) = +1, where the paper's rule maps zero to -1 and the published code to 0.
    """
    axis = CONTRACTION_AXIS[role]
    scale = fitted_sign(granularity, axis, shift=shift, frozen=frozen)
    return compose(scale=scale, grid=Binary(), surrogate=by_name(surrogate), axis=axis)


def _rank_one_scale() -> Scale:
    """g [in, 1] and h [1, out], started at the rank-one approximation of |w|: OneBit, arXiv 2402.11295, eq. 4 to 7."""

    def init(x: Float[Array, "i o"]) -> QParams:
        left, right = rank_one(jnp.abs(x))
        return {"g": left, "h": right}

    def solve(x: Float[Array, "i o"], qparams: QParams, ctx: Ctx) -> tuple[Array, Field]:
        del ctx
        return x, RankOne(qparams["g"].astype(x.dtype), qparams["h"].astype(x.dtype))

    return Scale(init, solve, lambda shape: [(shape[0], 1), (1, shape[1])])


@method(
    "onebit",
    roles=WEIGHT,
    paper="OneBit, arXiv 2402.11295, eq. 3 to 7",
    choices=Choices(
        "learned, rank one: per input times per output",
        "binary",
        "tanh",
        around="output LayerNorm; loss: kl + hidden",
        notes="the surrogate is the published code's; the paper names none",
    ),
)
def onebit(role: str, *, surrogate: Name = "tanh") -> Quantizer:
    """LayerNorm(((x * g) @ sign(w)) * h), g and h learned, started from the rank-one approximation of |w|."""
    del role
    return compose(scale=_rank_one_scale(), grid=Binary(), surrogate=by_name(surrogate), axis=0, around=output_norm())


@method(
    "binarymos",
    roles=WEIGHT,
    paper="BinaryMoS, arXiv 2406.12311, eq. 5 to 8",
    choices=Choices(
        "learned experts of input and output scales, mixed per token by a gate",
        "binary",
        "clip",
        around="token-gated scales; loss: kl + 10*hidden",
    ),
)
def binarymos(role: str, *, experts: int = 4, surrogate: Name = "clip") -> Quantizer:
    """((x * (r A_in)) @ sign(w)) * (r A_out) with r = softmax(x G) for each token; the bare quantizer is sign(w)."""
    del role
    if experts < 1:
        raise InputError(f"binarymos:experts={experts} must be at least 1; the paper takes 4")
    around = scale_experts(experts)
    return compose(scale=unitless(), grid=Binary(), surrogate=by_name(surrogate), axis=0, around=around)


def _centred(granularity: str, axis: int) -> Scale:
    """Mean and standard deviation, held out of the gradient; in the units of the deviation."""

    def solve(x: Float[Array, "..."], qparams: QParams, ctx: Ctx) -> tuple[Array, Field]:
        del qparams, ctx
        axes, fixed = reduced_axes(granularity, x.ndim, axis), jax.lax.stop_gradient(x)
        mean, std = jnp.mean(fixed, axes, keepdims=True), deviation(fixed, axes) + LEAST
        return (x - mean) / std, Affine(std, mean)

    return Scale(lambda x: {}, solve, shaped(granularity, axis, 2))


def _two_sets(axis: int) -> Scale:
    """alpha sign((x - beta) / alpha) + beta, both learned, per tensor: AdaBin, arXiv 2208.08084, eq. 8 and 9."""

    def init(x: Float[Array, "..."]) -> QParams:
        one = jnp.ones_like(x, shape=(1,) * x.ndim)
        return {"alpha": one, "beta": 0 * one}

    def solve(x: Float[Array, "..."], qparams: QParams, ctx: Ctx) -> tuple[Array, Field]:
        del ctx
        alpha, beta = safe(qparams["alpha"].astype(x.dtype)), qparams["beta"].astype(x.dtype)
        return (x - beta) / jax.lax.stop_gradient(alpha), Affine(alpha, beta)

    return Scale(init, solve, shaped("tensor", axis, 2))


@method(
    "adabin",
    roles=BOTH,
    paper="AdaBin, arXiv 2208.08084, eq. 5 to 9",
    choices=Choices(
        "weights: standard deviation about the mean, per output; activations: learned centre and distance",
        "binary",
        "adabin; activations approxsign",
        notes="QuEST's baseline keeps the activations' scale at 1 and centre at 0 (rule=code)",
    ),
)
def adabin(role: str, *, rule: Rule = "paper") -> Quantizer:
    """Two levels at beta - alpha and beta + alpha: of a weight its mean and deviation, of an activation learned."""
    axis = CONTRACTION_AXIS[role]
    if role == "weight":
        return compose(scale=_centred("output", axis), grid=Binary(), surrogate=by_name("adabin"), axis=axis)
    scale = _two_sets(axis) if rule == "paper" else unitless()
    return compose(scale=scale, grid=Binary(), surrogate=by_name("approxsign"), axis=axis)


def _dual_scale(group: int) -> Scale:
    """Two learned scales for each group of inputs of an output; levels second < 0 < first + second < first."""

    def grouped(x: Float[Array, "i o"]) -> Float[Array, "n g o"]:
        return x.reshape(groups(x.shape[0], group), group, x.shape[1])

    def init(x: Float[Array, "i o"]) -> QParams:
        blocks = grouped(x)
        step = jnp.maximum((jnp.max(blocks, 1) - jnp.min(blocks, 1)) / 3, LEAST)
        return {"first": 2 * step, "second": -step}

    def solve(x: Float[Array, "i o"], qparams: QParams, ctx: Ctx) -> tuple[Array, Field]:
        del ctx
        first, second = qparams["first"].astype(x.dtype), qparams["second"].astype(x.dtype)
        a, b = (spread(jax.lax.stop_gradient(s), x.shape) for s in (first, second))
        outer, inner, fixed = safe(-b), safe(a + b), jax.lax.stop_gradient(x)
        place = jnp.where(
            fixed < 0, fixed / outer, jnp.where(fixed < inner, fixed / inner, 1 + (fixed - inner) / outer)
        )
        units = place + (x - fixed) / safe((a - b) / 3)
        return units, Dual(first, second)

    return Scale(init, solve, lambda shape: [(groups(shape[0], group), shape[1])] * 2)


@method(
    "dbllm",
    roles=WEIGHT,
    paper="DB-LLM, arXiv 2402.11960, eq. 4 to 7 (flexible dual binarization)",
    choices=Choices(
        "two learned scales per group of 128 inputs",
        "two binary digits: -s, 0, s, 2s at the start",
        "identity",
        around="loss: the paper's deviation-aware distillation is not in it; kl comes nearest",
        notes="code never released; the rule follows the paper's thresholds",
    ),
)
def dbllm(role: str, *, group: int = 128) -> Quantizer:
    """first * b1 + second * b2 with binary digits b1, b2 and learned scales, started at 2s and -s, s the 2-bit step."""
    del role
    return compose(scale=_dual_scale(group), grid=Integers(-1, 2), surrogate=identity, axis=0, whole=True)
