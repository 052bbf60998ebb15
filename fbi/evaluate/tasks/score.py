"""The log-likelihood of continuations under a model: sorted by length, padded to few shapes, compiled once for each."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fbi.data.tokenizer import Tokenizer
from fbi.errors import InputError
from fbi.evaluate.mesh import check_batch, split_rows
from fbi.loss.logits import cross_entropy
from fbi.model.axes import mesh_in_use
from fbi.model.functional import Model, Params

Progress = Callable[[int, int], None]  # continuations done, continuations in all

_WIDTH = 32  # texts are padded to a multiple of this
_LEAST = 8  # scored positions are padded to a power of two from here on


class Likelihood(NamedTuple):
    """What a model makes of a continuation."""

    log_p: float
    """ln p(continuation | context) in nats: the sum over its tokens."""
    greedy: bool
    """Whether each of its tokens is the likeliest one, as in greedy decoding."""


def log_likelihoods(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    texts: Sequence[tuple[str, str]],
    *,
    batch: int = 16,
    progress: Progress | None = None,
) -> list[Likelihood]:
    """ln p(continuation | context) of each (context, continuation), in their order.

    Both are encoded on their own, so that no token crosses the boundary between them. An empty context is the beginning
    of a document: the separator token. `score_tokens` says what happens to what is too long, and when it refuses.
    """
    if tokenizer.vocab > model.config.vocab:
        raise InputError(f"the tokenizer has {tokenizer.vocab} tokens, the model {model.config.vocab}; they do not "
                         "belong together")  # fmt: skip
    # The answers of a document share their context, or their continuation: each text is encoded once.
    distinct = list(dict.fromkeys(text for pair in texts for text in pair))
    ids = dict(zip(distinct, tokenizer.encode_batch(distinct), strict=True))
    pairs = [(ids[context] or [tokenizer.separator], ids[continuation]) for context, continuation in texts]
    return score_tokens(model, params, pairs, batch=batch, progress=progress)


def score_tokens(
    model: Model,
    params: Params,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch: int = 16,
    progress: Progress | None = None,
) -> list[Likelihood]:
    """ln p(continuation | context) of each pair of token sequences, in their order, `batch` at a time on the mesh.

    Of a context that with its continuation passes the model's context, the right end is kept: model.config.context
    tokens before the last. An empty continuation has ln p = 0. Only the logits of continuation tokens are computed.
    Padding and the make-up of a batch change nothing but rounding, unless a quantizer's scale spans a whole batch.

    `InputError`: a continuation longer than the model's context, an empty context, a token that the model does not
    know, a batch that does not split over the mesh.
    """
    mesh = mesh_in_use()
    check_batch(batch, mesh, model.axes.batch)
    rows = [_row(model, context, continuation) for context, continuation in pairs]
    shapes = [_shape(model, row) for row in rows]
    # The longest first: what does not fit into memory fails at once. Rows of one shape lie together.
    order = sorted(range(len(rows)), key=lambda i: shapes[i], reverse=True)
    found = [Likelihood(0.0, True)] * len(rows)
    pending: tuple[list[int], Array, Array] | None = None  # read one batch late: the device never waits for the host
    done = 0

    def settle() -> None:
        nonlocal done
        if pending is not None:
            indices, log_p, greedy = pending[0], *jax.device_get(pending[1:])
            for i, value, whole in zip(indices, log_p, greedy, strict=False):  # padding rows are left over
                found[i] = Likelihood(float(value), bool(whole))
            done += len(indices)
            if progress:
                progress(done, len(rows))

    with jax.set_mesh(mesh):
        for start in range(0, len(order), batch):
            indices = order[start : start + batch]
            width, count = (max(sizes) for sizes in zip(*(shapes[i] for i in indices), strict=True))
            arrays = _batch([rows[i] for i in indices], batch, width, count)
            outputs = _score(model, params, *(split_rows(mesh, model.axes.batch, array) for array in arrays))
            settle()
            pending = indices, *outputs
        settle()
    return found


class _Row(NamedTuple):
    """Tokens, the last `scored` of which are the continuation."""

    tokens: np.ndarray
    scored: int


def _row(model: Model, context: Sequence[int], continuation: Sequence[int]) -> _Row:
    """One continuation after as much of its context as the model can see; refuses what cannot be scored."""
    most, vocab = model.config.context, model.config.vocab
    if not len(context):
        raise InputError("an empty context has nothing to go on; begin with the separator token")
    if len(continuation) > most:
        raise InputError(f"a continuation of {len(continuation)} tokens passes the model's context of {most}; shorten "
                         "it, or use a model of a longer context")  # fmt: skip
    tokens = np.asarray([*context, *continuation], np.int32)[-(most + 1) :]
    if tokens.min() < 0 or tokens.max() >= vocab:
        wrong = tokens[(tokens < 0) | (tokens >= vocab)][0]
        raise InputError(f"the text has token {wrong}; the model knows 0 to {vocab - 1}")
    return _Row(tokens, len(continuation))


def _shape(model: Model, row: _Row) -> tuple[int, int]:
    """Width and number of scored positions that a row is padded to: few values, so that few programs are compiled."""
    width = min(-(-(len(row.tokens) - 1) // _WIDTH) * _WIDTH, model.config.context)
    return max(width, 1), max(_LEAST, 1 << (max(row.scored, 1) - 1).bit_length())


def _batch(
    rows: Sequence[_Row], batch: int, width: int, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Inputs [b, t], scored positions and their labels [b, c], and how many of these are real [b].

    Rows are padded on the right, where causal attention never looks.
    """
    inputs = np.zeros((batch, width), np.int32)
    positions, labels = np.zeros((2, batch, count), np.int32)
    scored = np.zeros(batch, np.int32)  # a row that only fills the batch scores nothing
    for i, (tokens, own) in enumerate(rows):
        length = len(tokens) - 1
        inputs[i, :length] = tokens[:-1]
        positions[i, :own] = np.arange(length - own, length)
        labels[i, :own] = tokens[len(tokens) - own :]
        scored[i] = own
    return inputs, positions, labels, scored


@functools.partial(jax.jit, static_argnums=0)
def _score(
    model: Model,
    params: Params,
    inputs: Int[Array, "b t"],
    positions: Int[Array, "b c"],
    labels: Int[Array, "b c"],
    scored: Int[Array, " b"],
) -> tuple[Float[Array, " b"], Bool[Array, " b"]]:
    """The sum of ln p(label) over the first `scored` of the positions of each row, and whether all are the likeliest.

    The head is applied to these positions only: the logits that `features` returns are not used, and XLA drops them.
    """
    pick = lambda hidden: jnp.take_along_axis(hidden, positions[..., None], 1)  # noqa: E731
    hidden = model.features(params, inputs, wanted={"head": pick})[1]["head"]
    logits = model.head(params, hidden)
    nats = cross_entropy(logits, labels)
    counts = jnp.arange(labels.shape[1])[None, :] < scored[:, None]
    likeliest = jnp.argmax(logits, -1) == labels
    return -jnp.sum(jnp.where(counts, nats, 0.0), 1), jnp.all(likeliest | ~counts, 1)
