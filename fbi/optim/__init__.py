"""Optimizers from optax: configuration without jax, schedules and AdamW with it."""

from fbi.lazy import lazy_names

_ADAMW = "fbi.optim.adamw"
__getattr__ = lazy_names(
    "fbi.optim",
    {
        "OptimizerConfig": "fbi.optim.config",
        "check": "fbi.optim.config",
        "build": _ADAMW,
        "decay_mask": _ADAMW,
        "learning_rate": _ADAMW,
        "weight_decay": _ADAMW,
    },
)
