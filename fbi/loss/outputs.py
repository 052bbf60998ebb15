"""What a loss may look at."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from jaxtyping import Array, Float, Int


class Outputs(NamedTuple):
    """Logits [b, t, v] of student and teacher, the token that follows each position, and features of both.

    Logits are None where a loss is computed in chunks, for the terms over features. Features are keyed as
    `Model.features` returns them, [layers, b, t, x]; only those that a loss asks for are there.
    """

    logits: Float[Array, "b t v"] | None
    labels: Int[Array, "b t"]
    teacher_logits: Float[Array, "b t v"] | None = None
    features: Mapping[str, Array] = {}
    teacher_features: Mapping[str, Array] = {}


class Watch(NamedTuple):
    """What a step tells besides its loss: features of the student that it looks at, and sums over positions of them."""

    features: tuple[str, ...] = ()
    sums: Callable[[Outputs], dict[str, Float[Array, ""]]] = lambda out: {}


NO_WATCH = Watch()
