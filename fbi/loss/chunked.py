"""A loss over logits that never exist whole: product, loss and gradient of one chunk of tokens after the other.

Logits of a large vocabulary are the largest arrays of a training step, several times over with a teacher and with
their gradients. Here the gradient of the final hidden states and of the head is made together with the value, chunk by
chunk, so that nothing is computed twice and only as many logits exist as a chunk has tokens.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fbi.errors import InputError
from fbi.loss.lesson import Lesson
from fbi.loss.outputs import Outputs
from fbi.loss.weighted import NO_WEIGHTS, Loss
from fbi.model.dense import Product


class Readout(NamedTuple):
    """Final hidden states and head, as `Model.head_product` gives them, and `Model.head_logits`."""

    product: Product
    logits: Callable[[Array, Product], Array]


class _How(NamedTuple):
    """What does not depend on arrays."""

    loss: Loss
    size: int
    student: Callable[[Array, Product], Array]
    teacher: Callable[[Any, Any, Array], Array] | None


def check_chunks(loss: Loss, size: int) -> None:
    """Refuses a size below 0, and a loss whose value at one token depends on the others."""
    if size < 0:
        raise InputError(f"loss_chunk={size} must be at least 0 (0: the logits of all tokens at once)")
    if size and loss.whole_batch:
        raise InputError(
            f"{', '.join(loss.whole_batch)} looks at the whole batch, which loss_chunk={size} computes in parts; "
            "use loss_chunk=0, or an option that fixes it, as cakld:beta=0.5"
        )


def chunked(
    loss: Loss,
    out: Outputs,
    student: Readout,
    teacher: Lesson | None,
    size: int,
    weights: Mapping[str, Float[Array, ""]] = NO_WEIGHTS,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """What `loss` gives for these logits, computed for `size` tokens of each device at a time; on a mesh.

    `out` has labels and features, no logits. Only the loss itself may be differentiated, not the sums beside it.
    """
    check_chunks(loss, size)
    over_logits, over_features = loss.split
    how = _How(over_logits, size, student.logits, teacher.logits if teacher else None)
    given = (teacher.fixed, teacher.pieces) if teacher else None
    sums = cast(dict[str, Array], _summed(how, student.product, given, out.labels, dict(weights)))
    if over_features.terms:
        found = {name: jnp.sum(value) for name, value in over_features.positions(out, weights).items()}
        sums = sums | found | {"loss": sums["loss"] + found["loss"]}
    return sums["loss"], sums


class _Cut(NamedTuple):
    """How the tokens of a batch [b, t] are cut: each of `shards` devices has `chunks` chunks of `size`."""

    shards: int
    rows: Any
    """What splits the batch."""
    chunks: int
    size: int
    tokens: int
    """Of a device."""

    @classmethod
    def of(cls, labels: Int[Array, "b t"], size: int) -> "_Cut":
        rows = jax.typeof(labels).sharding.spec[0]
        names = rows if isinstance(rows, tuple) else (rows,) if rows else ()
        shards = math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in names)
        tokens = labels.size // shards
        chunks = -(-tokens // size)
        return cls(shards, rows, chunks, -(-tokens // chunks), tokens)

    def __call__(self, x: Array) -> Array:
        """[b, t, *x] as [chunks, shards, size, *x]; the end is filled up with zeros."""
        rest = (None,) * (x.ndim - 2)
        x = self._reshaped(x, (self.shards, x.shape[0] // self.shards, *x.shape[1:]), (None, None, *rest))
        x = self._reshaped(x, (self.shards, self.tokens, *x.shape[3:]), (None, *rest))
        x = jnp.pad(x, [(0, 0), (0, self.chunks * self.size - self.tokens)] + [(0, 0)] * len(rest))
        x = self._reshaped(x, (self.shards, self.chunks, self.size, *x.shape[2:]), (None, None, *rest))
        return x.swapaxes(0, 1)

    def joined(self, x: Array, shape: tuple[int, ...]) -> Array:
        """The inverse, for an array of that shape."""
        rest = (None,) * (x.ndim - 3)
        x = x.swapaxes(0, 1)
        x = self._reshaped(x, (self.shards, self.chunks * self.size, *shape[2:]), (None, *rest))[:, : self.tokens]
        x = self._reshaped(x, (self.shards, shape[0] // self.shards, *shape[1:]), (None, None, *rest))
        return self._reshaped(x, shape, (None, *rest))

    def _reshaped(self, x: Array, shape: tuple[int, ...], rest: tuple) -> Array:
        return jnp.reshape(x, shape, out_sharding=jax.P(self.rows, *rest))

    def counted(self) -> Array:
        """Which places [chunks, 1, size] hold a token."""
        return (jnp.arange(self.chunks * self.size) < self.tokens).reshape(self.chunks, 1, self.size)


def _run(
    how: _How,
    student: Product,
    teacher: tuple[Any, Any] | None,
    labels: Int[Array, "b t"],
    weights: Mapping[str, Array],
    *,
    gradient: bool,
) -> tuple[dict[str, Array], Any]:
    """The sums of all chunks; with the gradient, that of the loss by (x, full, after, memo)."""
    cut = _Cut.of(labels, how.size)
    split = jax.typeof(student.full).sharding.spec[1]
    logits, tokens = jax.P(cut.rows, None, split), jax.P(cut.rows, None, None)
    fixed, taught = teacher or (None, None)
    pieces = jax.tree.map(cut, ((student.x, student.memo), taught, labels)), cut.counted()

    def values(y: Array, after: Any, memo: Any, taught: Any, labels: Array, counted: Array) -> Any:
        own = how.student(y, student._replace(after=after, memo=memo))
        known = None if how.teacher is None else how.teacher(fixed, taught, jax.lax.stop_gradient(own))
        found = how.loss.positions(Outputs(own, labels, known), weights)
        sums = {name: jnp.sum(jnp.where(counted, value, 0), 1) for name, value in found.items()}
        return jnp.sum(sums["loss"]), sums

    def chunk(total: tuple[Array, Any] | None, piece: Any) -> tuple[Any, Any]:
        ((x, memo), taught, labels), counted = piece
        y = jnp.dot(x, student.full, out_sharding=logits)
        counted = jnp.broadcast_to(counted, labels.shape)
        if total is None:
            return None, values(y, student.after, memo, taught, labels, counted)[1]
        own = lambda y, after, memo: values(y, after, memo, taught, labels, counted)  # noqa: E731
        _, back, sums = jax.vjp(own, y, student.after, memo, has_aux=True)
        dy, dafter, dmemo = back(jnp.ones((), sums["loss"].dtype))
        dx = jax.lax.dot_general(dy, student.full, (((2,), (1,)), ((), ())), out_sharding=tokens)
        # One sum for each part of the batch: they meet after the last chunk, not after each.
        dw = jax.lax.dot_general(x, dy, (((1,), (1,)), ((0,), (0,))), out_sharding=logits)
        total = total[0] + dw, jax.tree.map(jnp.add, total[1], dafter)
        return total, (sums, dx, dmemo)

    if not gradient:
        sums = jax.lax.scan(chunk, None, pieces)[1]
        return _total(sums), None
    i, o = student.full.shape
    wide = jnp.promote_types(student.full.dtype, jnp.float32)
    start = jnp.zeros((cut.shards, i, o), wide, out_sharding=logits), jax.tree.map(jnp.zeros_like, student.after)
    (dw, dafter), (sums, dx, dmemo) = jax.lax.scan(chunk, start, pieces)
    dx, dmemo = jax.tree.map(lambda part, like: cut.joined(part, like.shape), (dx, dmemo), (student.x, student.memo))
    rest = jax.typeof(student.w).sharding.spec
    dw = jax.lax.reduce_sum(dw, [0], out_sharding=rest).astype(student.w.dtype)
    return _total(sums), (dx, dw, dafter, dmemo)


def _total(sums: dict[str, Float[Array, "chunks shards"]]) -> dict[str, Float[Array, ""]]:
    return {name: jnp.sum(value) for name, value in sums.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(
    how: _How, student: Product, teacher: tuple | None, labels: Int[Array, "b t"], weights: dict[str, Array]
) -> dict[str, Float[Array, ""]]:
    """The sums of `Loss.positions`; the derivative is that of `loss` alone."""
    return _run(how, student, teacher, labels, weights, gradient=False)[0]


def _forward(
    how: _How, student: Product, teacher: tuple | None, labels: Array, weights: dict[str, Array]
) -> tuple[dict[str, Array], Any]:
    return _run(how, student, teacher, labels, weights, gradient=True)


def _backward(how: _How, gradients: Any, given: dict[str, Array]) -> tuple[Any, None, None, None]:
    del how
    dx, dw, dafter, dmemo = jax.tree.map(lambda g: (g * given["loss"]).astype(g.dtype), gradients)
    return Product(dx, dw, None, dafter, dmemo), None, None, None  # pyright: ignore[reportArgumentType]


_summed.defvjp(_forward, _backward)
