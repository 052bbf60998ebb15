"""A model as pure functions over plain nested dicts: the one file that splits and merges modules."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fbi.model import config as shapes
from fbi.model import taps
from fbi.model.attention import Cache, Where
from fbi.model.axes import Axes, mesh_1x1
from fbi.model.config import ModelConfig
from fbi.model.decoder import BLOCK_SITES, OPERAND_SITES, STACKED, Blocks, Decoder, logits_of, segments
from fbi.model.dense import Product
from fbi.model.router import adds_noise
from fbi.model.routing import check_leaks
from fbi.policy import Methods, Policy, Site
from fbi.quant import Ctx

Params = dict[str, Any]


def _no_mesh() -> bool:
    return jax.sharding.get_abstract_mesh().empty


@contextlib.contextmanager
def _some_mesh() -> Iterator[None]:
    """Enters a 1x1 mesh where none is set, so that a notebook needs none."""
    with jax.set_mesh(mesh_1x1()) if _no_mesh() else contextlib.nullcontext():
        yield


def _compiled(function: Callable, static: tuple[int, ...] = ()) -> Callable:
    """`function` compiled under a 1x1 mesh: where none is set, only inside jit may a transformation enter one."""

    @functools.partial(jax.jit, static_argnums=static)
    def call(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh_1x1().abstract_mesh) if _no_mesh() else contextlib.nullcontext():
            return function(*args)

    return call


def sites_of(config: ModelConfig) -> list[Site]:
    """Every place of the model that a policy may name, in order."""
    linear = shapes.linear_shapes(config)
    block = [(name, linear.get(name)) for name in BLOCK_SITES if name in linear or name in OPERAND_SITES]
    layers = [Site(f"layers.{i}.{name}", shape) for i in range(config.layers) for name, shape in block]
    head = Site("head", None if config.tied else (config.dim, config.vocab))
    return [Site("embed", (config.vocab, config.dim)), *layers, head]


class Model:
    """A decoder under a policy. Parameters are plain nested dicts that the caller keeps; nothing here holds arrays."""

    def __init__(
        self,
        config: ModelConfig,
        policy: Policy = Policy(),
        *,
        axes: Axes = Axes(),
        remat: bool = False,
        remat_keeps: str = "nothing",
        unroll: int = 1,
        blocks: Blocks = STACKED,
    ):
        shapes.check(config)
        self.config, self.policy, self.axes, self.remat, self.unroll = config, policy, axes, remat, unroll
        self.blocks, self.remat_keeps = blocks, remat_keeps
        self.bound = policy.bind(self.sites, config.layers)
        check_leaks(config, self.bound)

    @property
    def sites(self) -> list[Site]:
        """Every place that a policy may name, in order."""
        return sites_of(self.config)

    def _build(self, key: Array) -> Decoder:
        return Decoder(self.config, self.bound, self.axes, nnx.Rngs(key), self.blocks)

    @functools.cached_property
    def _structure(self) -> Any:
        with _some_mesh():
            return nnx.graphdef(nnx.eval_shape(lambda: self._build(jax.random.key(0))))

    def fresh(self, key: Array) -> Params:
        """Fresh parameters, within a compiled function on a mesh."""
        return nnx.to_pure_dict(nnx.split(self._build(key), nnx.Param)[1])

    def init(self, key: Array | int = 0) -> Params:
        """Fresh parameters, each made where the mesh keeps it; `key` is a PRNG key or a seed."""
        with _some_mesh():
            return jax.jit(self.fresh)(jax.random.key(key) if isinstance(key, int) else key)

    def abstract(self) -> Params:
        """Shapes, types and shardings of the parameters on the mesh in use."""
        with _some_mesh():
            return jax.eval_shape(lambda: self.fresh(jax.random.key(0)))

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "b t"],
        documents: Int[Array, "b t"] | None = None,
        ctx: Ctx = Ctx(),
    ) -> Float[Array, "b t v"]:
        """Logits for the token after each position; attention stays within `documents` where they are given."""
        return self.features(params, tokens, documents, ctx)[0]

    def features(
        self,
        params: Params,
        tokens: Int[Array, "b t"],
        documents: Int[Array, "b t"] | None = None,
        ctx: Ctx = Ctx(),
        wanted: Mapping[str, taps.Reducer] | Sequence[str] = (),
    ) -> tuple[Float[Array, "b t v"], dict[str, Any]]:
        """The logits of `apply`, and intermediate values by the names of `fbi.model.taps`.

        `wanted` names features (`layers.*.out`, `layers.*.attn.{q,k}.out`, `head`), or maps each to a function that is
        applied to the value in its layer, so that a large tensor need not leave it. Values come back by their name
        without `layers.*.`, with a leading axis of layers: `out` is [layers, b, t, d]; `head` is [b, t, d].
        `InputError` for a name that this model does not have.
        """
        found = tuple(taps.resolve(self.config, wanted).items())
        return (self._features_alone if _no_mesh() else self._features)(params, tokens, documents, ctx, found)

    def _features(
        self,
        params: Params,
        tokens: Array,
        documents: Array | None,
        ctx: Ctx,
        wanted: tuple[tuple[str, taps.Reducer], ...],
    ) -> tuple[Array, dict[str, Any]]:
        positions = jnp.arange(tokens.shape[1])
        where = Where(positions, positions, documents)
        decoder = nnx.merge(self._structure, params)
        kept = self.remat_keeps if self.remat else ""
        logits, _, features = decoder(tokens, where, ctx=ctx, remat=kept, unroll=self.unroll, wanted=dict(wanted))
        return logits, features

    @functools.cached_property
    def _features_alone(self) -> Callable:
        return _compiled(self._features, static=(4,))

    def head(self, params: Params, hidden: Float[Array, "b t d"], ctx: Ctx = Ctx()) -> Float[Array, "b t v"]:
        """Logits of hidden states as the feature `head` of `features` gives them, where not every position is wanted.

        In one compiled function, `features(..., wanted={"head": pick})` and this compute the logits of what `pick`
        keeps and of nothing else.
        """
        return (self._head_alone if _no_mesh() else self._head)(params, hidden, ctx)

    def _head(self, params: Params, hidden: Array, ctx: Ctx) -> Array:
        return nnx.merge(self._structure, params).logits(hidden, ctx)

    def head_product(self, params: Params, hidden: Float[Array, "b t d"], ctx: Ctx = Ctx()) -> Product:
        """What the head multiplies for hidden states as `head` takes them, on a mesh; with `head_logits` it is `head`.

        The logits of part of the positions are those of the product with that part of `x` and `memo`: so they need not
        all exist at a time.
        """
        return nnx.merge(self._structure, params).operands(hidden, None, ctx)

    def head_logits(self, y: Float[Array, "b t v"], product: Product) -> Float[Array, "b t v"]:
        """The logits, in float32 at least, of y = x @ full of what `head_product` gives."""
        return logits_of(self.bound.get("head", Methods()), y, product)

    @functools.cached_property
    def _head_alone(self) -> Callable:
        return _compiled(self._head)

    def empty_cache(self, batch: int, length: int) -> dict[str, Cache]:
        """Room for `length` positions of keys and values, by segment, [layers, b, g, s, k]."""
        c = self.config
        out: dict[str, Cache] = {}
        with _some_mesh():
            for start, stop in segments(self.bound, c.layers, self.blocks.stacked):
                shape = (stop - start, batch, c.kv_heads, length, c.head_dim)
                spec = jax.P(None, self.axes.batch, self.axes.heads, None, None)
                k, v = (jnp.zeros(shape, c.dtype, out_sharding=spec) for _ in "kv")
                out[f"layers_{start}_{stop}"] = Cache(k, v)
        return out

    def extend(
        self, params: Params, tokens: Int[Array, "b t"], caches: dict[str, Cache], position: Int[Array, ""] | int
    ) -> tuple[Float[Array, "b t v"], dict[str, Cache]]:
        """Logits for tokens at `position` and on, given the caches of what came before; and the caches with them."""
        return (self._extend_alone if _no_mesh() else self._extend)(params, tokens, caches, position)

    def _extend(
        self, params: Params, tokens: Array, caches: dict[str, Cache], position: Array | int
    ) -> tuple[Array, dict[str, Cache]]:
        length = jax.tree.leaves(caches)[0].shape[3]
        where = Where(position + jnp.arange(tokens.shape[1]), jnp.arange(length))
        logits, updated, _ = nnx.merge(self._structure, params)(tokens, where, caches)
        assert updated is not None  # caches went in
        return logits, updated

    @functools.cached_property
    def _extend_alone(self) -> Callable:
        return _compiled(self._extend)

    @functools.cached_property
    def draws(self) -> bool:
        """Whether any quantizer rounds at random in training, or a router adds noise."""
        return adds_noise(self.config) or any(q.draws for methods in set(self.bound.values()) for q in methods.build())

    def parameter_count(self) -> int:
        """Every parameter, the learned scales of the policy included."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.abstract()))
