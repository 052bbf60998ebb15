"""A loss as text: terms by name with weights and options, joined by `+`."""

import dataclasses
import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fbi.errors import InputError, unknown
from fbi.loss.kinds import KINDS, Kind
from fbi.loss.logits import next_token, teacher_entropy
from fbi.loss.outputs import Outputs

NO_WEIGHTS: Mapping[str, Any] = MappingProxyType({})
ALIASES = {"mix": "0.5*ce + 0.5*ad"}  # FBI-LLM's published code, its mode use_kd=2


@dataclasses.dataclass(frozen=True)
class Term:
    """One weighted term of a loss."""

    weight: float
    kind: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Term":
        """Reads `kind`, `weight*kind`, `weight*kind:option=value,...`."""
        found = re.fullmatch(r"(?:([^*]+)\*)?\s*([\w-]+)(?::(.+))?", text.strip())
        if not found:
            raise InputError(f"loss term {text.strip()!r} is not WEIGHT*KIND:OPTIONS, as in '0.5*ad:temperature=2'")
        weight, kind, rest = found.groups()
        if kind not in KINDS:
            raise unknown("loss", kind, [*KINDS, *ALIASES])
        known, options = KINDS[kind].options, {}
        number = _number(weight or "1", float, "loss weight")
        if not math.isfinite(number):
            raise InputError(f"loss {text.strip()!r}: the weight {number} must be a finite number")
        for part in (rest or "").split(",") if rest else ():
            name, _, value = (piece.strip() for piece in part.partition("="))
            if name not in known:
                raise unknown(f"{kind} option", name, known)
            if name in options:
                raise InputError(f"loss {text.strip()!r}: option {name!r} is given twice; keep one")
            options[name] = _number(value, known[name].kind, f"{kind}:{name}")
            if not known[name].allowed(options[name]):
                raise InputError(f"loss {text.strip()!r}: {name}={options[name]} must be {known[name].rule}")
        return cls(number, kind, tuple(sorted(options.items())))

    @property
    def registered(self) -> Kind:
        """What its kind is and needs."""
        return KINDS[self.kind]

    def __call__(self, out: Outputs) -> Float[Array, "b t"]:
        """Its value at each position, before its weight."""
        if self.registered.needs_teacher and out.teacher_logits is None and not out.teacher_features:
            raise InputError(
                f"the loss term {self.kind!r} needs a teacher; set teacher to the directory of a finished run"
            )
        return self.registered.term(out, **dict(self.options))


def _number(text: str, kind: type, what: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise InputError(f"{what}={text.strip()!r} is not {'a whole number' if kind is int else 'a number'}") from None


def _features(terms: tuple[Term, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for t in terms for name in t.registered.features(dict(t.options))))


@dataclasses.dataclass(frozen=True)
class Loss:
    """A weighted sum of terms."""

    terms: tuple[Term, ...]

    @classmethod
    def parse(cls, text: str) -> "Loss":
        """Reads terms joined by `+`, or an alias."""
        return cls(tuple(Term.parse(part) for part in ALIASES.get(text.strip(), text).split("+")))

    @property
    def needs_teacher(self) -> bool:
        """Whether any term looks at teacher logits."""
        return any(term.registered.needs_teacher for term in self.terms)

    @property
    def features(self) -> tuple[str, ...]:
        """The features of the student that the terms look at, as `Model.features` takes them."""
        return _features(self.terms)

    @property
    def teacher_features(self) -> tuple[str, ...]:
        """Those of the teacher: of the terms that need one."""
        return _features(tuple(term for term in self.terms if term.registered.needs_teacher))

    @property
    def whole_batch(self) -> tuple[str, ...]:
        """The terms whose value at one position depends on the rest of the batch, so that it cannot be cut in parts."""
        return tuple(term.kind for term in self.terms if term.registered.whole_batch(dict(term.options)))

    def __call__(
        self, out: Outputs, weights: Mapping[str, Float[Array, ""]] = NO_WEIGHTS
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The loss summed over positions, and sums to log; `weights` take the place of a term's own, by its kind.

        They are `loss`; each term without its weight by its kind (with its options where a kind stands there with more
        than one set of them); `ce` in any case; and with a teacher `floor`, its entropy.
        """
        sums = {name: jnp.sum(value) for name, value in self.positions(out, weights).items()}
        return sums["loss"], sums

    def positions(
        self, out: Outputs, weights: Mapping[str, Float[Array, ""]] = NO_WEIGHTS
    ) -> dict[str, Float[Array, "b t"]]:
        """What `__call__` sums, at each position; `ce` and `floor` where there are logits."""
        parts = [(term, term(out)) for term in self.terms]
        weighted = [weights.get(term.kind, term.weight) * value for term, value in parts]
        total = sum(weighted[1:], weighted[0]) if weighted else jnp.zeros_like(out.labels, jnp.float32)
        values = {self._label(term): value for term, value in parts}
        found = {"loss": total}
        if out.logits is not None:
            found["ce"] = values.pop("ce") if "ce" in values else jax.lax.stop_gradient(next_token(out))
        if out.teacher_logits is not None:
            found["floor"] = teacher_entropy(out)
        return found | values

    def task(self, sums: Mapping[str, float]) -> float:
        """Of the sums that `__call__` gives, the loss without its regularizers; whole where it has nothing else."""
        terms = [term for term in self.terms if not term.registered.regularizer]
        if len(terms) in (0, len(self.terms)):
            return sums["loss"]
        return sum(term.weight * sums[self._label(term)] for term in terms)

    @property
    def split(self) -> "tuple[Loss, Loss]":
        """Its terms over logits, and those over features."""
        over_features = tuple(t for t in self.terms if t.registered.features(dict(t.options)))
        return Loss(tuple(t for t in self.terms if t not in over_features)), Loss(over_features)

    def _label(self, term: Term) -> str:
        others = {t.options for t in self.terms if t.kind == term.kind} - {term.options}
        options = ",".join(f"{name}={value:g}" for name, value in term.options)
        return f"{term.kind}:{options}" if others and options else term.kind
