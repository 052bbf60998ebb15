"""Bop, an optimizer of signs, and three restrictions on what an optimizer may change."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fbi.optim.groups import is_latent, is_scale, mask


class BopState(NamedTuple):
    """The running mean of each gradient."""

    mean: Any


def bop(gamma: float, threshold: float) -> optax.GradientTransformation:
    """Flips the sign of a weight once its gradient has long enough pushed against it.

    m <- (1 - gamma) m + gamma g; where |m| > threshold and sign(m) = sign(w), w <- -w: Helwegen et al., arXiv
    1906.02107, algorithm 1. There w is a sign; here a latent of any size, whose size never changes: what a method takes
    from |w| (a mean, say) stays, and a method that rounds to signs sees a flip. sign(0) = +1; a zero has no other sign.
    g is the gradient at the latent: a method that scales its signs by alpha scales g, and so the threshold, alike.
    The update is -2 w or 0: there is no learning rate, and nothing after this transform may scale it.
    """

    def init(params: optax.Params) -> BopState:
        return BopState(jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: optax.Updates, state: BopState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, BopState]:
        assert params is not None, "Bop needs the parameters"
        mean = jax.tree.map(lambda m, g: (1 - gamma) * m + gamma * g, state.mean, updates)

        def flip(m: jax.Array, w: jax.Array) -> jax.Array:
            against = (jnp.abs(m) > threshold) & ((m >= 0) == (w >= 0))
            return jnp.where(against, -2 * w, jnp.zeros((), w.dtype))

        return jax.tree.map(flip, mean, params), BopState(mean)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def clip_latents(bound: float) -> optax.GradientTransformation:
    """Keeps the latent matrices of the blocks in [-bound, bound] after the update; the last transform of a chain.

    BinaryConnect, Courbariaux et al., arXiv 1511.00363, section 2.4, with bound 1: beyond it a latent has no effect on
    its sign and would only take longer to come back. The bound is met up to the rounding of w + (bound - w).
    """

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        assert params is not None, "clipping needs the parameters"
        clipped = jax.tree.map(lambda u, w: jnp.clip(w + u, -bound, bound) - w, updates, params)
        return clipped, state

    return optax.masked(
        optax.GradientTransformation(lambda params: optax.EmptyState(), update),  # pyright: ignore[reportArgumentType]
        mask(is_latent),
    )


def freeze_scales() -> optax.GradientTransformation:
    """Zero in place of what reaches the learned leaves of quantizers: before a clip by norm, and after a decay."""
    return optax.masked(optax.set_to_zero(), mask(is_scale))


def freeze_zeros() -> optax.GradientTransformation:
    """Zero in place of what reaches the zeros among the latent matrices of the blocks: what was pruned stays so."""

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        assert params is not None, "freezing zeros needs the parameters"
        return jax.tree.map(lambda u, w: jnp.where(w == 0, jnp.zeros((), u.dtype), u), updates, params), state

    return optax.masked(
        optax.GradientTransformation(lambda params: optax.EmptyState(), update),  # pyright: ignore[reportArgumentType]
        mask(is_latent),
    )
