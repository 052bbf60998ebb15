"""Diagnostics of one weight tensor and its codes, through the public functions of a quantizer alone.

Each is a `Ratio`: what is summed and what it is divided by, so that tensors and devices are pooled by adding both.
All are pure, differentiate nothing of yours, and may be compiled, mapped over a stack of layers, and sharded.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from fbi.quant import Ctx, QParams, Quantizer, decode

NEAR = 0.1  # of half a step


class Ratio(NamedTuple):
    """A mean or a share, total / over, before the division."""

    total: Array
    over: Array

    @property
    def value(self) -> Array:
        """The quotient; not a number where there is nothing to divide by."""
        return self.total / self.over


def _over_entries(total: Array, like: Array) -> Ratio:
    return Ratio(total, jnp.asarray(like.size, jnp.float32))


def _wide(w: Array) -> Array:
    return w.astype(jnp.promote_types(w.dtype, jnp.float32))


def flips(before: Integer[Array, "*s"], after: Integer[Array, "*s"]) -> Ratio:
    """The share of codes that differ; of signs, the flip-flop ratio of FBI-LLM, arXiv 2407.07093, section 4.

    There before and after are one optimizer step apart. A sign is a code of two values, with zero on the side of +1.
    """
    return _over_entries(jnp.sum(before != after), after)


def entropy(codes: Integer[Array, "*s"]) -> Ratio:
    """Shannon entropy of the codes in bits per entry, -sum_c p_c log2 p_c with p_c the share of code c.

    At most 1 for signs and log2 3 for ternary codes; total is the length that an ideal coder of this tensor reaches.
    """
    low, high = jnp.min(codes).astype(jnp.int32), jnp.max(codes).astype(jnp.int32)

    def add(code: Array, total: Array) -> Array:
        p = jnp.mean(codes == code, dtype=jnp.float32)
        return total - jnp.where(p > 0, p * jnp.log2(jnp.where(p > 0, p, 1.0)), 0.0)

    bits = jax.lax.fori_loop(low, high + 1, add, jnp.zeros((), jnp.float32))
    return _over_entries(bits * codes.size, codes)


def relative_error(w: Float[Array, "*s"], w_hat: Float[Array, "*s"]) -> Ratio:
    """||w - w_hat||^2 / ||w||^2. Of N(0, 1), for signs times mean|w|: 1 - 2 / pi = 0.3634."""
    w, w_hat = _wide(w), _wide(w_hat)
    return Ratio(jnp.sum(jnp.square(w - w_hat)), jnp.sum(jnp.square(w)))


def half_step(quantizer: Quantizer, w: Float[Array, "*s"], qparams: QParams) -> Float[Array, ""]:
    """Half the distance to the neighbouring level, as the root mean square over entries: alpha for alpha * sign(w).

    Found by decoding the codes moved by one towards the middle of those that occur. Exact where one scale serves the
    tensor, also under a rotation (which keeps the norm of the difference); else an average of the scales.
    """
    encoded = quantizer.encode(w, qparams)
    codes = encoded.codes.astype(jnp.int32)
    inward = jnp.where(2 * codes > jnp.max(codes) + jnp.min(codes), codes - 1, codes + 1)
    moved = dataclasses.replace(encoded, codes=inward.astype(encoded.codes.dtype))
    return jnp.sqrt(jnp.mean(jnp.square(decode(moved) - decode(encoded)))) / 2


def margin(quantizer: Quantizer, w: Float[Array, "*s"], qparams: QParams) -> Ratio:
    """The mean magnitude of the latents in units of half a step: 1 for sign(w) mean|w|, 2 for BitNet b1.58 (mean|w|).

    A learned scale lets it drift: latents far above 1 flip no more, far below 1 they flip with noise.
    """
    return _over_entries(jnp.sum(jnp.abs(_wide(w))) / half_step(quantizer, w, qparams), w)


def near_threshold(quantizer: Quantizer, w: Float[Array, "*s"], qparams: QParams, key: PRNGKeyArray) -> Ratio:
    """The share of latents within a tenth of half a step of a threshold between two codes.

    Counted as the codes that change when every latent moves by that much, at random signs and then at the opposite
    ones: each latent near a threshold crosses it in one of the two. So thresholds need not be known, and a rotation
    sees a random perturbation of that size. A scale that is a statistic of w moves by a small second-order amount.
    """
    nudge = NEAR * half_step(quantizer, w, qparams) * jax.random.rademacher(key, w.shape, _wide(w).dtype)
    codes = quantizer.encode(w, qparams).codes
    up, down = (quantizer.encode(_wide(w) + sign * nudge, qparams).codes for sign in (1, -1))
    return _over_entries(jnp.sum(up != codes) + jnp.sum(down != codes), w)


def masked(quantizer: Quantizer, w: Float[Array, "*s"], qparams: QParams, ctx: Ctx = Ctx()) -> Ratio:
    """The share of entries whose gradient the surrogate zeroes: QuEST, arXiv 2502.05003, section 3.

    With J the derivative of apply, the zeros of J J^T 1, which are those of the slopes for a method that works entry by
    entry and for one that stays in a rotated basis. A method that rotates back shows one coefficient of each
    block (the sum), a sample of 1 / block of the mask.
    """
    _, pull = jax.vjp(lambda latent: quantizer.apply(latent, qparams, ctx), w)
    ones = jnp.ones_like(_wide(w))
    push = jax.linear_transpose(lambda cotangent: pull(cotangent)[0], ones)
    return _over_entries(jnp.sum(push(pull(ones)[0])[0] == 0), w)
