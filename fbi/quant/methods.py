"""The published methods, each a few lines that name its choices: transform, scale, grid, surrogate."""

from typing import Literal

from fbi.errors import InputError
from fbi.quant.grid import Binary, Integers
from fbi.quant.quantizer import Quantizer, compose, full_precision
from fbi.quant.registry import CONTRACTION_AXIS, method
from fbi.quant.scale import fitted_sign, max_abs, mean_abs, statistic
from fbi.quant.surrogate import surrogate as by_name

Granularity = Literal["input", "output", "tensor"]
Gradient = Literal["identity", "clip"]
Rule = Literal["paper", "code"]


@method("none", roles=("weight", "activation"), paper="full precision")
def none(role: str) -> Quantizer:
    """Full precision: changes nothing."""
    del role
    return full_precision()


@method("fbi", roles=("weight",), paper="FBI-LLM, arXiv 2407.07093, section 3.1")
def fbi(
    role: str,
    *,
    granularity: Granularity = "input",
    shift: bool = True,
    frozen: bool = False,
    surrogate: Gradient = "identity",
) -> Quantizer:
    """Binary weights alpha * sign(w) + beta, alpha and beta learned.

    One pair per input feature ("column" in the paper) by default; dL/dw = alpha dL/dw_hat, without a clip.
    sign(0) = +1, where the paper's rule maps zero to -1 and the published code to 0.
    """
    axis = CONTRACTION_AXIS[role]
    scale = fitted_sign(granularity, axis, shift=shift, frozen=frozen)
    return compose(scale=scale, grid=Binary(), surrogate=by_name(surrogate), axis=axis)


@method("absmax", roles=("weight", "activation"), paper="BitNet a4.8, arXiv 2411.04965, section 2 (INT8 absmax)")
def absmax(role: str, *, bits: int = 8, rule: Rule = "paper", surrogate: Gradient = "identity") -> Quantizer:
    """Symmetric integers scaled by the largest magnitude, per token of an activation, per output of a weight.

    (s / Q) RoundClip(Q / s x, -Q - 1, Q) with s = max|x| and Q = 2^(bits - 1) - 1; `rule` guards s against zero.
    """
    if not 2 <= bits <= 8:
        raise InputError(f"absmax:bits={bits} is out of range; allowed: 2 to 8")
    axis, top = CONTRACTION_AXIS[role], 2 ** (bits - 1) - 1
    scale = statistic(max_abs, "output", axis, rule=rule, top=top)
    return compose(scale=scale, grid=Integers(-top - 1, top), surrogate=by_name(surrogate), axis=axis)


@method("bitnet-b158", roles=("weight", "activation"), paper="BitNet b1.58, arXiv 2402.17764, equations 1 to 3")
def bitnet_b158(role: str, *, rule: Rule = "paper", surrogate: Gradient = "identity") -> Quantizer:
    """Ternary weights s RoundClip(w / s, -1, 1) with s = mean|w| of the matrix; as an activation, absmax:bits=8.

    `rule` guards s against zero: the paper adds an epsilon, the published training code takes max(s, 1e-5).
    """
    if role == "activation":
        return absmax(role, rule=rule, surrogate=surrogate)
    axis = CONTRACTION_AXIS[role]
    scale = statistic(mean_abs, "tensor", axis, rule=rule)
    return compose(scale=scale, grid=Integers(-1, 1), surrogate=by_name(surrogate), axis=axis)
