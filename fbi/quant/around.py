"""What a method adds around the product of a layer: y = post(pre(x) @ w_hat), with parameters of its own."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fbi.quant.scale import QParams

Memo = Any


class Around(NamedTuple):
    """A pair of pure functions and their parameters.

    `init(w, key) -> params` for a weight [in, out]; `pre(x, params) -> (x, memo)` comes before the activation is
    quantized; `post(y, params, memo) -> y` after the product; `shapes(shape)` are the numbers stored.
    """

    init: Callable[[Array, Array], QParams] = lambda w, key: {}
    pre: Callable[[Array, QParams], tuple[Array, Memo]] = lambda x, params: (x, None)
    post: Callable[[Array, QParams, Memo], Array] = lambda y, params, memo: y
    shapes: Callable[[tuple[int, ...]], list[tuple[int, ...]]] = lambda shape: []


NOTHING = Around()


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _row(parameter: Array, y: Array) -> Array:
    """A [1, n] parameter against the last axis of y."""
    return parameter.reshape((1,) * (y.ndim - 1) + (-1,)).astype(y.dtype)


def output_norm(eps: float = 1e-5) -> Around:
    """LayerNorm over the outputs, without gain or offset: OneBit, arXiv 2402.11295, eq. 3 and its published code."""

    def post(y: Float[Array, "... o"], params: QParams, memo: Memo) -> Float[Array, "... o"]:
        del params, memo
        wide = _wide(y)
        centred = wide - jnp.mean(wide, -1, keepdims=True)
        return (centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + eps)).astype(y.dtype)

    return Around(post=post)


def prelu_shifted() -> Around:
    """RPReLU: PReLU(y - g) + z with g, z and the slope learned per output; ReActNet, arXiv 2003.03488, eq. 6."""

    def init(w: Float[Array, "i o"], key: Array) -> QParams:
        del key
        row = jnp.zeros((1, w.shape[1]), jnp.promote_types(w.dtype, jnp.float32))
        return {"gamma": row, "zeta": row, "slope": row + 0.25}

    def post(y: Float[Array, "... o"], params: QParams, memo: Memo) -> Float[Array, "... o"]:
        del memo
        gamma, zeta, slope = (_row(params[name], y) for name in ("gamma", "zeta", "slope"))
        moved = y - gamma
        return jnp.where(moved > 0, moved, slope * moved) + zeta

    return Around(init=init, post=post, shapes=lambda shape: [(1, shape[1])] * 3)


def rank_one(magnitude: Float[Array, "i o"], rounds: int = 8) -> tuple[Float[Array, "i 1"], Float[Array, "1 o"]]:
    """left [in, 1] and right [1, out] whose product is nearest to a non-negative matrix, by power iteration.

    Its top singular pair, the singular value shared evenly: OneBit's SVID, arXiv 2402.11295, eq. 4 to 7. Sums along
    axes instead of a decomposition: they work on a sharded matrix.
    """
    tiny = jnp.finfo(magnitude.dtype).tiny
    top = jnp.max(magnitude, keepdims=True) + tiny  # products of very large or small entries leave the float range
    scaled = magnitude / top
    left, right = jnp.sum(scaled, 1, keepdims=True), jnp.mean(scaled, 0, keepdims=True) + 1e-30
    for _ in range(rounds):
        right = right / (jnp.sqrt(jnp.sum(jnp.square(right), keepdims=True)) + tiny)
        left = jnp.sum(scaled * right, 1, keepdims=True)
        left = left / (jnp.sqrt(jnp.sum(jnp.square(left), keepdims=True)) + tiny)
        right = jnp.sum(scaled * left, 0, keepdims=True)
    value = jnp.sqrt(jnp.sum(jnp.square(right), keepdims=True))
    half = jnp.sqrt(value) * jnp.sqrt(top)
    return left * half, right / (value + tiny) * half


def scale_experts(experts: int) -> Around:
    """Scales of inputs and outputs mixed for each token by a softmax gate: BinaryMoS, arXiv 2406.12311, eq. 5 to 8.

    r = softmax(x G); y = ((x * (r A_in)) @ sign(w)) * (r A_out). All experts start at the rank-one scales of |w|; the
    gate, started at random, breaks their symmetry.
    """

    def init(w: Float[Array, "i o"], key: Array) -> QParams:
        wide = _wide(w)
        left, right = rank_one(jnp.abs(wide))
        gate = jax.random.normal(key, (w.shape[0], experts), wide.dtype) * w.shape[0] ** -0.5
        return {
            "gate": gate,
            "into": jnp.tile(left.T, (experts, 1)),
            "out": jnp.tile(right, (experts, 1)),
        }

    def mixed(shares: Float[Array, "... e"], scales: Float[Array, "e n"]) -> Float[Array, "... n"]:
        return sum(
            (shares[..., k : k + 1] * _row(scales[k : k + 1], shares) for k in range(1, experts)),
            shares[..., :1] * _row(scales[:1], shares),
        )

    def pre(x: Float[Array, "... i"], params: QParams) -> tuple[Float[Array, "... i"], Memo]:
        wide = _wide(x)
        gate = params["gate"].astype(wide.dtype)
        # Sums, not a product of matrices: the inputs of a row-parallel layer are split over devices.
        logits = [jnp.sum(wide * _row(gate[:, k : k + 1].T, wide), -1, keepdims=True) for k in range(experts)]
        shares = jax.nn.softmax(jnp.concatenate(logits, -1), axis=-1)
        return (wide * mixed(shares, params["into"])).astype(x.dtype), shares

    def post(y: Float[Array, "... o"], params: QParams, memo: Memo) -> Float[Array, "... o"]:
        return (_wide(y) * mixed(memo, params["out"])).astype(y.dtype)

    def shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [(shape[0], experts), (experts, shape[0]), (experts, shape[1])]

    return Around(init, pre, post, shapes)
