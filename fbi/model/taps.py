"""Intermediate values of a model by the name of their site, taken while it is traced.

A layer hands each value that may be of interest to `tap`. Where somebody collects that name, a reducer is applied to
the value at once and what it returns is kept; elsewhere `tap` returns its argument and leaves no trace in the program.

    attn.q        the input of that linear layer, after the norm inside it and before its quantizer
    attn.q.out    its output
    attn.kv       values (keys come before them, and are overwritten) as the cache keeps them, [b, t, g, k]
    attn.qk       queries and keys after the rotary positions, a pair of [b, t, h, k] and [b, t, g, k]
    mlp.router    the scores of the experts of a routed MLP, in (0, 1), those of experts in use above 0.5, [b, t, n]
    mlp.router.logits   what its router made them of, any number
    out           the residual stream after a block
    head          the input of the head, after the last norm

A feature is asked for as `layers.*.attn.q.out` (or `attn.q.out`, or a glob such as `layers.*.attn.{q,k}.out`) and
answered for all layers at once: what the reducer returns gets a leading axis of layers.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, TypeVar

from fbi.errors import unknown
from fbi.model.config import ModelConfig, linear_shapes
from fbi.policy import glob_pattern

Value = TypeVar("Value")
Reducer = Callable[[Any], Any]  # a value at a site -> a pytree of arrays
Wanted = Mapping[str, Reducer]

NOTHING: Wanted = MappingProxyType({})
LAYERS = "layers.*."
OPERANDS = ("attn.kv", "attn.qk")
ROUTER = "mlp.router"
LOGITS = f"{ROUTER}.logits"

_collector: ContextVar[tuple[Wanted, dict[str, Any]] | None] = ContextVar("collector", default=None)


def identity(x: Value) -> Value:
    """The reducer that keeps the value as it is."""
    return x


@contextlib.contextmanager
def collect(wanted: Wanted) -> Iterator[dict[str, Any]]:
    """Within, `tap` keeps the wanted values in the dictionary that is yielded: name -> what the reducer returned.

    Collector and taps belong in one trace: a scan body opens its own, and returns what it found.
    """
    found: dict[str, Any] = {}
    token = _collector.set((wanted, found))
    try:
        yield found
    finally:
        _collector.reset(token)


def tap(name: str, x: Value) -> Value:
    """Offers the value `x` of the site `name` to whoever collects; returns `x`."""
    if (collector := _collector.get()) is not None:
        wanted, found = collector
        if name in wanted:
            found[name] = wanted[name](x)
    return x


def names(config: ModelConfig) -> list[str]:
    """Every feature that a model of this shape has, a layer's without its prefix."""
    linear = [name for site in linear_shapes(config) for name in (site, f"{site}.out")]
    return [*linear, *OPERANDS, *([ROUTER, LOGITS] if config.expert else []), "out", "head"]


def resolve(config: ModelConfig, wanted: Mapping[str, Reducer] | Sequence[str]) -> dict[str, Reducer]:
    """Features as they are asked for -> tap name -> reducer; a sequence of names keeps the values as they are.

    Raises `InputError` for a name that matches nothing, with those that there are.
    """
    if not isinstance(wanted, Mapping):
        wanted = dict.fromkeys([wanted] if isinstance(wanted, str) else wanted, identity)
    known = names(config)
    found: dict[str, Reducer] = {}
    for feature, reducer in wanted.items():
        pattern = glob_pattern(feature.removeprefix(LAYERS))
        matched = [name for name in known if pattern.fullmatch(name)]
        if feature.startswith(LAYERS):
            matched = [name for name in matched if name != "head"]
        if not matched:
            raise unknown("feature", feature, [name if name == "head" else LAYERS + name for name in known])
        found |= dict.fromkeys(matched, reducer)
    return found
