"""Optimizers from optax: learning-rate schedules, what is decayed, clipping, and the whole chain."""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from fbi.optim.bop import bop, clip_latents, freeze_scales, freeze_zeros
from fbi.optim.config import OptimizerConfig, check
from fbi.optim.groups import is_latent, is_router, mask

Schedule = Callable[[Any], Any]


FROZEN: dict[str, tuple[optax.GradientTransformation, ...]] = {
    "": (),
    "scales": (freeze_scales(),),
    "zeros": (freeze_zeros(),),
}


def warmup_steps(config: OptimizerConfig, steps: int) -> int:
    """The number of warm-up steps of a run of that length."""
    return round(config.warmup * steps) if config.warmup < 1 else round(config.warmup)


def learning_rate(config: OptimizerConfig, steps: int) -> Schedule:
    """The learning rate of optimizer step 0, 1, ... of a run of `steps`.

    two-stage: BitNet b1.58's training tips; the rate falls to zero over the run along `shape`, with a step from the
    first to the second peak at half. The tips print peaks, not the shape: linear is our default.
    """
    warm = warmup_steps(config, steps)
    if config.schedule == "two-stage":
        left = {
            "linear": lambda share: 1 - share,
            "cosine": lambda share: 0.5 * (1 + jnp.cos(jnp.pi * share)),
        }[config.shape]

        def two_stage(step: Any) -> Array:
            share = jnp.clip(step / max(steps, 1), 0.0, 1.0)
            peak = jnp.where(step < steps / 2, config.lr, config.second_lr)
            return peak * left(share) * jnp.minimum(1.0, step / max(warm, 1))

        return two_stage
    rise = optax.linear_schedule(0.0, config.lr, warm)
    if config.schedule == "cosine":
        rest = optax.cosine_decay_schedule(config.lr, max(steps - warm, 1), alpha=config.final)
        return optax.join_schedules([rise, rest], [warm])
    # Warm-up, stable, decay: Hu et al., MiniCPM, arXiv 2404.06395, section 4.
    falling = max(round(config.decay_share * steps), 1)
    fall = optax.linear_schedule(config.lr, config.final * config.lr, falling)
    return optax.join_schedules([rise, optax.constant_schedule(config.lr), fall], [warm, max(steps - falling, warm)])


def weight_decay(config: OptimizerConfig, steps: int) -> Schedule:
    """The decay of each step: constant, or 0 in the second half of two-stage."""
    second = 0.0 if config.schedule == "two-stage" else config.weight_decay
    return lambda step: jnp.where(step < steps / 2, config.weight_decay, second)


def decay_mask(params: Any, decay: str) -> Any:
    """A tree of booleans: what is decayed. `latent`: matrices `w` of the blocks, not scales, norms, embedding, head.

    Routers never are: decay would pull their scores to the threshold, and move those that are frozen.
    """
    return mask(lambda path: is_latent(path) or (decay == "everything" and not is_router(path)))(params)


def adamw(config: OptimizerConfig, steps: int) -> tuple[optax.GradientTransformation, ...]:
    """The parts of AdamW, in order; Loshchilov & Hutter, arXiv 1711.05101."""
    return (
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(weight_decay(config, steps), mask=lambda p: decay_mask(p, config.decay)),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
        *((optax.masked(optax.scale(config.router_lr), mask(is_router)),) if config.router_lr != 1 else ()),
    )


def build(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `steps`: global-norm clipping, AdamW or Bop, and the restrictions that are asked for.

    Under `latent="bop"` the latent matrices of the blocks are Bop's (no learning rate, no decay), all else is AdamW's.
    Raises `InputError` for a value out of range.
    """
    check(config)
    parts = adamw(config, steps)
    if config.latent == "bop":
        kinds: dict[Hashable, optax.GradientTransformation] = {
            "bop": bop(config.bop_gamma, config.bop_threshold),
            "adamw": optax.chain(*parts),
        }
        names = {True: "bop", False: "adamw"}
        parts = (optax.partition(kinds, lambda p: jax.tree.map(names.__getitem__, mask(is_latent)(p))),)
    frozen = FROZEN[config.freeze]
    return optax.chain(
        *frozen,
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        *parts,
        *frozen,
        *((clip_latents(config.latent_clip),) if config.latent_clip else ()),
    )
