"""A watch over the loss: spikes and non-finite values."""

import math

from fbi.train.run import GuardConfig

MEMORY = 0.95  # of the running mean
SETTLE = 20  # steps before a spike can be told from the fall of the first losses


class Guard:
    """Compares each step's loss with its running mean. `state` is plain data, for the checkpoint."""

    def __init__(self, config: GuardConfig):
        self.config = config
        self.mean, self.seen = 0.0, 0

    @property
    def state(self) -> dict[str, float | int]:
        """What a checkpoint keeps."""
        return {"mean": self.mean, "seen": self.seen}

    @state.setter
    def state(self, value: dict[str, float | int]) -> None:
        self.mean, self.seen = float(value["mean"]), int(value["seen"])

    def fault(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with this step, None where nothing is; a good step enters the running mean."""
        if not math.isfinite(loss):
            return f"loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"gradient norm is {grad_norm}"
        if self.seen >= SETTLE and loss > self.mean + self.config.spike:
            return f"loss {loss:.4f} is more than {self.config.spike} above its running mean {self.mean:.4f}"
        self.seen += 1
        weight = max(1 - MEMORY, 1 / self.seen)
        self.mean += weight * (loss - self.mean)
        return None
