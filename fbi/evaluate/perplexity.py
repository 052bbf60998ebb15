"""The loss of a model on a token stream, in nats per token, as perplexity and in bits per byte."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from fbi.errors import InputError
from fbi.evaluate.mesh import check_batch, split_rows
from fbi.loss import Outputs, next_token
from fbi.model.axes import mesh_in_use
from fbi.model.functional import Model, Params

Progress = Callable[[int, int], None]  # windows done, windows in all


@dataclasses.dataclass(frozen=True)
class Score:
    """Sums and counts over the scored tokens."""

    nats: float
    """Sum of -ln p."""
    tokens: int
    """Scored tokens."""
    bytes: int
    """Bytes of text that they stand for."""
    windows: int
    """Windows they were in."""
    tallied: Any = dataclasses.field(default_factory=dict, compare=False)
    """What was asked to be tallied besides, summed over them: a tree of NumPy arrays."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(self.loss) if self.loss < 700 else math.nan if math.isnan(self.loss) else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, which compares models of unlike tokenizers; nan where no token stands for text."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


class Tally(NamedTuple):
    """What else to sum up: `sums(features, scored [b, t])` of these features over the scored positions, as a tree."""

    features: tuple[str, ...] = ()
    sums: Callable[[Mapping[str, Array], Array], Any] = lambda features, scored: {}


NO_TALLY = Tally()


class Span(NamedTuple):
    """A window of the stream: where it starts, and the first of its predictions that is scored."""

    start: int
    first: int


def spans(length: int, window: int, stride: int) -> list[Span]:
    """The whole windows of `window` tokens at 0, stride, 2 stride, ... of a stream; what fills no window is dropped.

    A window makes window - 1 predictions. Where windows overlap (stride < window), all but the first score only their
    last `stride` predictions: with stride = window - 1 every token but the first of the stream is scored once.
    """
    if window < 2:
        raise InputError(f"window is {window}; a prediction needs at least 2 tokens")
    if stride < 1:
        raise InputError(f"stride is {stride}; it must be at least 1")
    if length < window:
        raise InputError(f"the stream has {length} tokens, less than a window of {window}; give more text or a smaller "
                         "window")  # fmt: skip
    later = max(0, window - 1 - stride)
    return [Span(start, later if start else 0) for start in range(0, length - window + 1, stride)]


def evaluate(
    model: Model,
    params: Params,
    tokens: Integer[np.ndarray, " n"],
    *,
    token_bytes: Integer[np.ndarray, " v"],
    window: int,
    stride: int,
    batch: int,
    separator: int | None = None,
    limit: int = 0,
    progress: Progress | None = None,
    tally: Tally = NO_TALLY,
) -> Score:
    """The score of a token stream, `batch` windows at a time on the mesh in use; compiled once a model and shape.

    `stride >= window` is FBI-LLM's protocol (arXiv 2407.07093, its evaluation code: disjoint windows of 2048, each the
    mean of its 2047 predictions, exp of the mean over windows; the tail dropped). `stride = window - 1` scores every
    token but the first once. `separator`: attention stays within documents, each of which this token begins.
    `limit`: at most so many windows, 0 for all. `tally`: what to sum up besides.
    """
    mesh = mesh_in_use()
    check_batch(batch, mesh, model.axes.batch)
    put = functools.partial(split_rows, mesh, model.axes.batch)
    if limit < 0:
        raise InputError(f"limit is {limit}; it must be at least 0, which means all windows")
    plan = spans(len(tokens), window, stride)
    plan = plan[:limit] if limit else plan
    if window - 1 > model.config.context:
        raise InputError(f"window {window} is more than the model's context {model.config.context} and one; shorten it")
    vocab = min(model.config.vocab, len(token_bytes))
    if (worst := int(tokens.max())) >= vocab or int(tokens.min()) < 0:
        raise InputError(f"the stream has token {worst}, the model and tokenizer know {vocab}; prepare the data anew")

    nats, counted, text = 0.0, 0, 0
    tallied: Any = None
    pending: tuple[Any, int] | None = None  # read one batch late, so that the device never waits for the host

    def settle() -> None:
        nonlocal nats, tallied
        if pending is not None:
            total, found = jax.device_get(pending[0])
            nats += float(total)
            found = jax.tree.map(np.float64, found)
            tallied = found if tallied is None else jax.tree.map(np.add, tallied, found)
            if progress:
                progress(pending[1], len(plan))

    with jax.set_mesh(mesh):
        for done in range(0, len(plan), batch):
            part = plan[done : done + batch]
            rows = np.zeros((batch, window), np.int32)
            first = np.full(batch, window, np.int32)  # a row that only fills the batch scores nothing
            for row, span in enumerate(part):
                rows[row] = tokens[span.start : span.start + window]
                first[row] = span.first
                scored = rows[row, span.first + 1 :]
                counted, text = counted + len(scored), text + int(token_bytes[scored].sum())
            total = _sums(model, separator, tally, params, put(rows), put(first))
            settle()
            pending = total, done + len(part)
        settle()
    return Score(nats, counted, text, len(plan), tallied)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sums(
    model: Model,
    separator: int | None,
    tally: Tally,
    params: Params,
    tokens: Int[Array, "b w"],
    first: Int[Array, " b"],
) -> tuple[Float[Array, ""], Any]:
    """The sum of -ln p(token | before) over the predictions from `first` on of each row, and what is tallied there."""
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    documents = None if separator is None else jnp.cumsum(inputs == separator, axis=1, dtype=jnp.int32)
    logits, features = model.features(params, inputs, documents, wanted=tally.features)
    losses = next_token(Outputs(logits, labels))
    scored = jnp.arange(losses.shape[1])[None, :] >= first[:, None]
    return jnp.sum(jnp.where(scored, losses, 0.0)), tally.sums(features, scored)
