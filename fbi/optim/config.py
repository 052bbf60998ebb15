"""What the optimizer is, as data. Imports no jax."""

import dataclasses
from typing import Literal

from fbi.errors import InputError
from fbi.fields import later


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Bop, and the schedule. Betas, decay and clipping are by default those of FBI-LLM (2407.07093, code)."""

    lr: float = 3e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "two-stage"] = "cosine"
    """Cosine to `final`; warm-up, stable, decay; or BitNet's two stages."""
    warmup: float = 0.1
    """Linear warm-up from 0: a share of the run below 1, a number of steps from 1 on."""
    final: float = 0.1
    """The last learning rate as a share of the peak (cosine and wsd)."""
    decay_share: float = 0.2
    """wsd: the last share of the run, in which the rate falls linearly."""
    second_lr: float = 2e-3
    """two-stage: the peak of the second half."""
    shape: Literal["linear", "cosine"] = "linear"
    """two-stage: how the rate falls within the run."""
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled decay; two-stage switches it off at half."""
    decay: Literal["latent", "everything"] = "latent"
    """What is decayed: the latent matrices of the blocks, or as in FBI-LLM's code every parameter (of routers none)."""
    clip: float = 1.0
    """Global norm to which gradients are clipped; 0: never."""
    latent: Literal["adamw", "bop"] = "adamw"
    """What moves the latent matrices of the blocks: AdamW like all else, or Bop, which only flips their signs."""
    bop_gamma: float = 1e-4
    """Bop: the weight of a new gradient in its running mean; the default is the paper's (arXiv 1906.02107)."""
    bop_threshold: float = 1e-8
    """Bop: the running mean from which on a sign flips; the paper's 1e-8 is for its losses and scales, so sweep it."""
    latent_clip: float = 0.0
    """Latent matrices of the blocks stay within plus and minus this (BinaryConnect takes 1.0); 0: never clipped."""
    freeze: Literal["", "scales", "zeros"] = ""
    """What gets no update: nothing, the learned leaves of quantizers (scales, shifts, clips), or zeros of the latent
    matrices of the blocks, so that pruned weights stay away."""
    router_lr: float = later(1.0)
    """The learning rate of routers as a multiple of the others': they begin where the rest is pretrained."""


def check(config: OptimizerConfig) -> None:
    """Refuses values out of range, naming the field."""
    for name, low, high in (
        ("lr", 0, None), ("second_lr", 0, None), ("warmup", 0, 1e9), ("final", 0, 1), ("decay_share", 0, 1),
        ("b1", 0, 1), ("b2", 0, 1), ("weight_decay", 0, None), ("clip", 0, None),
        ("bop_gamma", 0, 1), ("bop_threshold", 0, None), ("latent_clip", 0, None), ("router_lr", 0, None),
    ):  # fmt: skip
        value = getattr(config, name)
        if not value >= low or (high is not None and value > high):
            upper = f" and at most {high}" if high is not None else ""
            raise InputError(f"optimizer.{name}={value} is out of range; it must be at least {low}{upper}")
    for name in ("b1", "b2"):
        if getattr(config, name) == 1:
            raise InputError(f"optimizer.{name}=1.0 is out of range; it must be below 1")
    for name in ("eps", "bop_gamma"):
        if not getattr(config, name) > 0:
            raise InputError(f"optimizer.{name}={getattr(config, name)} is out of range; it must be above 0")
