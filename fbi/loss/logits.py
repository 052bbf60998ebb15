"""Losses over logits: next-token cross-entropy, autoregressive distillation, and any weighted sum of such terms.

A loss is text: `ce`, `ad`, `ad:temperature=2,top_k=64`, `0.5*ce + 0.5*ad`; `mix` is the last one.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fbi.errors import InputError, unknown

ALIASES = {"mix": "0.5*ce + 0.5*ad"}  # FBI-LLM's published code, its mode use_kd=2


class Outputs(NamedTuple):
    """What a loss may look at: logits [b, t, v] of student and teacher, and the token that follows each position."""

    logits: Float[Array, "b t v"]
    labels: Int[Array, "b t"]
    teacher_logits: Float[Array, "b t v"] | None = None


def log_normalizer(logits: Float[Array, "b t v"]) -> Float[Array, "b t"]:
    """log sum exp over the vocabulary."""
    return jax.nn.logsumexp(logits, axis=-1)


def next_token(out: Outputs) -> Float[Array, "b t"]:
    """Cross-entropy of the next token in nats, per position: -log softmax(logits)[label]."""
    # A comparison instead of a gather: the vocabulary axis may be split over devices.
    vocabulary = jnp.arange(out.logits.shape[-1])[None, None, :]
    label_logit = jnp.sum(jnp.where(vocabulary == out.labels[..., None], out.logits, 0), -1)
    return log_normalizer(out.logits) - label_logit


def _teacher(out: Outputs, temperature: float, top_k: int) -> Float[Array, "b t v"]:
    """Teacher probabilities at that temperature, of its `top_k` likeliest tokens renormalised (0, or as many: all)."""
    if out.teacher_logits is None:
        raise InputError("the loss term 'ad' needs a teacher; set teacher to the directory of a finished run")
    logits = jax.lax.stop_gradient(out.teacher_logits) / temperature
    if 0 < top_k < logits.shape[-1]:
        *rows, vocabulary = jax.typeof(logits).sharding.spec
        whole = logits if vocabulary is None else jax.sharding.reshard(logits, jax.P(*rows, None))
        least = jax.lax.top_k(whole, top_k)[0][..., -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.nn.softmax(logits, axis=-1)


def distillation(out: Outputs, *, temperature: float = 1.0, top_k: int = 0) -> Float[Array, "b t"]:
    """Soft cross-entropy to the teacher in nats, per position: -sum_v p_T(v) log p_S(v).

    FBI-LLM, arXiv 2407.07093, section 3.2: temperature 1, whole vocabulary, no label term. At another temperature both
    sides are softened and the loss is multiplied by its square (Hinton et al., arXiv 1503.02531, section 2).
    Its floor is the teacher's entropy, not zero.
    """
    target = _teacher(out, temperature, top_k)
    logits = out.logits / temperature
    return temperature**2 * (log_normalizer(logits) - jnp.sum(target * logits, -1))


def teacher_entropy(out: Outputs) -> Float[Array, "b t"]:
    """Entropy of the teacher's next-token distribution in nats: the floor of distillation at temperature 1."""
    assert out.teacher_logits is not None
    logits = jax.lax.stop_gradient(out.teacher_logits)
    return log_normalizer(logits) - jnp.sum(jax.nn.softmax(logits, -1) * logits, -1)


class Kind(NamedTuple):
    """A registered term: its function, whether it needs a teacher, and its options with their defaults."""

    term: Callable[..., Array]
    needs_teacher: bool
    options: dict[str, float | int]


KINDS: dict[str, Kind] = {
    "ce": Kind(next_token, False, {}),
    "ad": Kind(distillation, True, {"temperature": 1.0, "top_k": 0}),
}


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
            option, _, value = part.partition("=")
            if option.strip() not in known:
                raise unknown(f"{kind} option", option.strip(), known)
            if option.strip() in options:
                raise InputError(f"loss {text.strip()!r}: option {option.strip()!r} is given twice; keep one")
            options[option.strip()] = _number(value, type(known[option.strip()]), f"{kind}:{option.strip()}")
        if not 0 < options.get("temperature", 1.0) < math.inf:
            raise InputError(f"loss {text.strip()!r}: temperature={options['temperature']} must be above 0 and finite")
        if options.get("top_k", 0) < 0:
            raise InputError(f"loss {text.strip()!r}: top_k={options['top_k']} must be at least 0 (0: all)")
        return cls(number, kind, tuple(sorted(options.items())))


def _number(text: str, kind: type, what: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise InputError(f"{what}={text.strip()!r} is not {'a whole number' if kind is int else 'a number'}") from None


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
        return any(KINDS[term.kind].needs_teacher for term in self.terms)

    def __call__(self, out: Outputs) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The loss summed over positions, and sums to log: `loss`, `ce`, and with a teacher `floor`, its entropy."""
        parts = [(term, KINDS[term.kind].term(out, **dict(term.options))) for term in self.terms]
        total = jnp.sum(sum(term.weight * value for term, value in parts))
        plain = [value for term, value in parts if term.kind == "ce"]
        sums = {"loss": total, "ce": jnp.sum(plain[0] if plain else jax.lax.stop_gradient(next_token(out)))}
        if out.teacher_logits is not None:
            sums["floor"] = jnp.sum(teacher_entropy(out))
        return total, sums
