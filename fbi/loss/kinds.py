"""The terms by name: what each needs, and its options. A new term is a function and an entry here."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtyping import Array

from fbi.loss import features, logits, routing

Options = Mapping[str, Any]


class Option(NamedTuple):
    """A number that a term takes; its default stands in the term's signature."""

    kind: type
    allowed: Callable[[Any], bool]
    rule: str
    """What `allowed` asks for, in words."""


def _no_features(options: Options) -> tuple[str, ...]:
    del options
    return ()


def _as_it_is(options: Options) -> bool:
    """Whether the teacher is neither softened nor cut."""
    return options.get("temperature", 1) == 1 and not options.get("top_k")


class Kind(NamedTuple):
    """A registered term: its function of `Outputs`, whether it needs a teacher, its options, the features it looks at.

    `whole_batch` says for which options its value at one position depends on the other sequences of the batch; `linear`
    for which its gradient is linear in the teacher's probabilities: where estimates of these are unbiased, it is. A
    `regularizer` says how to get there, not what is learned: it may rise while the model gets better.
    """

    term: Callable[..., Array]
    needs_teacher: bool
    options: dict[str, Option] = {}  # noqa: RUF012
    features: Callable[[Options], tuple[str, ...]] = _no_features
    whole_batch: Callable[[Options], bool] = lambda options: False
    linear: Callable[[Options], bool] = lambda options: False
    regularizer: bool = False


TEMPERATURE = Option(float, lambda value: 0 < value < math.inf, "above 0 and finite")
TOP_K = Option(int, lambda value: value >= 0, "at least 0 (0: all)")
LAYERS = Option(int, lambda value: value >= 0, "at least 0 (0: all)")
BETA = Option(float, lambda value: 0 <= value <= 1, "from 0 to 1")
BETWEEN = Option(float, lambda value: 0 < value < 1, "above 0 and below 1")
POSITIVE = Option(float, lambda value: 0 < value < math.inf, "above 0 and finite")
WEIGHT = Option(float, lambda value: 0 <= value < math.inf, "at least 0 and finite")

_STREAM = "layers.*.out"
_ROUTER = f"layers.*.{routing.SCORES}"
_PROJECTIONS = tuple(f"layers.*.{name}" for name in features.PROJECTIONS)

KINDS: dict[str, Kind] = {
    "ce": Kind(logits.next_token, False),
    "ad": Kind(logits.distillation, True, {"temperature": TEMPERATURE, "top_k": TOP_K}, linear=_as_it_is),
    "kl": Kind(logits.forward_kl, True, {"temperature": TEMPERATURE}, linear=_as_it_is),
    "rkl": Kind(logits.reverse_kl, True, {"temperature": TEMPERATURE}),
    "cakld": Kind(
        logits.confidence_aware_kl,
        True,
        {"temperature": TEMPERATURE, "beta": BETA},
        whole_batch=lambda options: "beta" not in options,
    ),
    "hidden": Kind(features.hidden_states, True, {"layers": LAYERS}, lambda options: (_STREAM,)),
    "dmd": Kind(
        features.direction_matching,
        True,
        {"hidden": WEIGHT, "layers": LAYERS},
        lambda options: (*_PROJECTIONS, _STREAM) if options.get("hidden", 1.0) else _PROJECTIONS,
    ),
    "efficiency": Kind(routing.efficiency, False, {}, lambda options: (_ROUTER,), regularizer=True),
    "prediction": Kind(
        routing.prediction,
        False,
        {"sparsity": BETWEEN},
        lambda options: (f"layers.*.{routing.LOGITS}", f"layers.*.{routing.UNITS}"),
    ),
    "separability": Kind(
        routing.separability,
        False,
        {"tau": BETWEEN, "floor": POSITIVE},
        lambda options: (_ROUTER,),
        regularizer=True,
    ),
}
