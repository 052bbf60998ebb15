"""The decoder: embedding, stacked blocks scanned in segments of equal policy, head."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fbi.model import taps
from fbi.model.attention import Attention, Cache, Where
from fbi.model.axes import Axes, gathered, whole_input
from fbi.model.codes import FORMS
from fbi.model.config import ModelConfig, linear_shapes
from fbi.model.dense import Product, multiplied
from fbi.model.gather import GATHERS
from fbi.model.learned import Operand
from fbi.model.linear import Linear, finished, for_site
from fbi.model.mlp import mlp
from fbi.model.norm import RMSNorm
from fbi.policy import Methods
from fbi.quant import Ctx

BLOCK_SITES = ("attn.q", "attn.k", "attn.v", "attn.kv", "attn.probs", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
OPERAND_SITES = ("attn.kv", "attn.probs")  # of no weight
KEPT = {"nothing": None, "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}  # of a layer, by remat


class Blocks(NamedTuple):
    """How blocks are made and kept.

    `mlp` makes their MLP, with the arguments of `fbi.model.mlp.mlp`. `stacked`: layers of equal policy are one stack,
    which compiles once; else each layer has arrays of its own, which no loop copies out of a stack: for decoding.
    """

    mlp: Callable[..., nnx.Module] = mlp
    stacked: bool = True


STACKED = Blocks()


def segments(bound: dict[str, Methods], layers: int, stacked: bool = True) -> list[tuple[int, int]]:
    """Runs [start, stop) of layers whose sites all get equal methods: each run is one stack, scanned.

    Where they are not `stacked`, each layer is a run of its own.
    """
    plans = [tuple(bound.get(f"layers.{i}.{site}", Methods()) for site in BLOCK_SITES) for i in range(layers)]
    starts = [i for i in range(layers) if i == 0 or not stacked or plans[i] != plans[i - 1]]
    return list(zip(starts, [*starts[1:], layers], strict=True))


def latent_dtype(config: ModelConfig) -> jnp.dtype:
    """The type of latent weights: float32, or float64 where computation is."""
    return jnp.promote_types(config.dtype, jnp.float32)


def logits_of(head: Methods, y: Float[Array, "b t v"], product: Product) -> Float[Array, "b t v"]:
    """The logits of the head's product y, in float32 at least."""
    logits = finished(head, y, product)
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the norms lie where the config says."""

    def __init__(
        self, config: ModelConfig, methods: dict[str, Methods], axes: Axes, rngs: nnx.Rngs, make_mlp: Callable = mlp
    ):
        c, shapes, dtype = config, linear_shapes(config), latent_dtype(config)
        norm = lambda dim, kind: RMSNorm(dim, c.eps, dtype) if c.norm in kind else None  # noqa: E731
        split = {"attn.q": axes.heads, "attn.k": axes.heads, "attn.v": axes.heads, "attn.o": axes.heads}
        residual = c.init_std / ((2 * c.layers) ** 0.5 if c.residual_init else 1.0)

        def linear(site: str) -> Linear:
            inward = site in ("attn.o", "mlp.down")
            axis = split.get(site, axes.ff)
            return Linear(
                shapes[site],
                methods.get(site, Methods()),
                std=residual if inward else c.init_std,
                spec=axes.stored(axis if inward else None, None if inward else axis),
                dtype=dtype,
                norm=norm(shapes[site][0], ("inner",)),
                rngs=rngs,
                site=site,
                gather=GATHERS[axes.gather],
                form=FORMS[axes.product],
            )

        self.axes = axes
        self.attn_norm, self.mlp_norm = norm(c.dim, ("pre", "sub")), norm(c.dim, ("pre", "sub"))
        self.attn = Attention(
            linear,
            norm(shapes["attn.o"][0], ("sub",)),
            head_dim=c.head_dim,
            rope_base=c.rope_base,
            cache=methods.get("attn.kv", Methods()),
            probs=methods.get("attn.probs", Methods()),
            dtype=dtype,
            axes=axes,
        )
        self.mlp = make_mlp(c, linear, norm(c.ff, ("sub",)), norm(c.dim, ("inner",)), axes, dtype, rngs)

    def __call__(
        self, x: Float[Array, "b t d"], where: Where, cache: Cache | None, ctx: Ctx
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        whole = self.axes.whole
        mixed, cache = self.attn(whole(self.attn_norm(x) if self.attn_norm else x), where, cache, ctx)
        x = x + mixed
        x = x + self.mlp(whole(self.mlp_norm(x) if self.mlp_norm else x), ctx)
        taps.tap("out", whole(x))
        return x, cache


class Decoder(nnx.Module):
    """Tokens to logits. Layers are stacked; a policy that differs by depth cuts the stack into segments."""

    def __init__(
        self, config: ModelConfig, bound: dict[str, Methods], axes: Axes, rngs: nnx.Rngs, blocks: Blocks = STACKED
    ):
        self.config, self.axes, self.bound = config, axes, bound
        dtype = latent_dtype(config)
        table = (config.vocab, config.dim)
        self.embed = nnx.Param(
            config.init_std * jax.random.normal(rngs.params(), table, dtype, out_sharding=self._table_spec)
        )
        self.segments = segments(bound, config.layers, blocks.stacked)
        keys = jax.random.split(rngs.params(), config.layers)  # a layer starts alike under every policy
        for start, stop in self.segments:
            methods = {site: bound.get(f"layers.{start}.{site}", Methods()) for site in BLOCK_SITES}

            def build(key: Array, methods: dict[str, Methods] = methods) -> Block:
                return Block(config, methods, axes, nnx.Rngs(key), blocks.mlp)

            setattr(self, f"layers_{start}_{stop}", jax.vmap(build)(keys[start:stop]))
        self.norm = RMSNorm(config.dim, config.eps, dtype)
        if config.tied:
            self.head: Any = Operand(bound.get("head", Methods()), 3, config.dim, dtype, "head")
        else:
            self.head = Linear(
                (config.dim, config.vocab),
                bound.get("head", Methods()),
                std=config.init_std,
                spec=axes.stored(None, axes.vocab),
                dtype=dtype,
                norm=None,
                rngs=rngs,
                gather=GATHERS[axes.gather],
            )

    @property
    def _table_spec(self) -> jax.P:
        return jax.P(self.axes.vocab, self.axes.fsdp)

    def _table(self, ctx: Ctx) -> Float[Array, "v d"]:
        """The embedding as used: quantized where the policy says, in the compute type."""
        quantizer, table = self.bound.get("embed", Methods()).build()[0], self.embed[...]
        spec = self._table_spec
        table = jax.sharding.reshard(table, whole_input(spec) if quantizer.whole else spec)
        used = quantizer.apply(table, {}, for_site(ctx, "embed")).astype(self.config.dtype)
        return jax.sharding.reshard(used, spec)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        where: Where,
        caches: dict[str, Cache] | None = None,
        ctx: Ctx = Ctx(),
        remat: str = "",
        unroll: int = 1,
        wanted: taps.Wanted = taps.NOTHING,
    ) -> tuple[Float[Array, "b t v"], dict[str, Cache] | None, dict[str, Any]]:
        """Logits in float32 at least, the caches with these positions written where caches are given, and features.

        `remat` names what of a layer is kept beside its input and not computed again (of `KEPT`); empty: everything.
        """
        table = self._table(ctx)
        whole = jax.sharding.reshard(table, jax.P(None, None))
        x = whole.at[tokens].get(out_sharding=self.axes.stream)
        updated: dict[str, Cache] = {}
        pieces: list[dict[str, Any]] = []  # of the features, a stack for each segment
        for start, stop in self.segments:
            name = f"layers_{start}_{stop}"

            def body(
                x: Array, layer: tuple[Block, Cache | None, Array]
            ) -> tuple[Array, tuple[Cache | None, dict[str, Any]]]:
                block, cache, number = layer
                own = ctx if ctx.key is None else ctx._replace(key=jax.random.fold_in(ctx.key, number))
                with taps.collect(wanted) as found:
                    x, cache = block(x, where, cache, own)
                return x, (cache, found)

            step: Callable = jax.checkpoint(body, policy=KEPT[remat]) if remat else body
            layers = (getattr(self, name), None if caches is None else caches[name], jnp.arange(start, stop))
            x, (cache, found) = jax.lax.scan(step, x, layers, unroll=min(unroll, stop - start))
            if cache is not None:
                updated[name] = cache
            pieces.append(found)
        features = jax.tree.map(lambda *parts: jnp.concatenate(parts), *pieces)
        x = self.axes.whole(self.norm(x))
        if "head" in wanted:
            features["head"] = wanted["head"](x)
        return self.project(x, table, ctx), updated or None, features

    def logits(self, x: Float[Array, "b t d"], ctx: Ctx = Ctx()) -> Float[Array, "b t v"]:
        """The logits of hidden states as the feature `head` gives them: the head alone."""
        return self.project(x, self._table(ctx), ctx)

    def project(self, x: Float[Array, "b t d"], table: Float[Array, "v d"], ctx: Ctx) -> Float[Array, "b t v"]:
        """The head, `table` being the embedding as used, in float32 at least."""
        product = self.operands(x, table, ctx)
        y = multiplied(product, self.axes.hidden(self.axes.vocab))
        return logits_of(self.bound.get("head", Methods()), y, product)

    def operands(self, x: Float[Array, "b t d"], table: Float[Array, "v d"] | None, ctx: Ctx) -> Product:
        """What the head multiplies; None: the embedding is to be made."""
        if not self.config.tied:
            return self.head.operands(x, ctx)
        table = self._table(ctx) if table is None else table
        full = jax.sharding.reshard(jax.lax.stop_gradient(table), gathered(self._table_spec))
        return Product(self.head(x, for_site(ctx, "head")), table.T, full.T)
