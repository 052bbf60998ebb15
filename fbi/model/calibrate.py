"""The start of what activation quantizers learn: one batch of the full-precision forward, site by site."""

from collections.abc import Callable, Container
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from fbi.model.attention import scores as attention_scores
from fbi.model.attention import softmax_weights
from fbi.model.axes import mesh_in_use
from fbi.model.decoder import BLOCK_SITES, segments
from fbi.model.functional import Model, Params
from fbi.policy import Methods, Policy
from fbi.quant import Method

SEQUENCES = 8  # of the batch that attention probabilities are looked at


def learned_sites(model: Model) -> list[str]:
    """The sites whose activation quantizer learns something."""
    token = jax.ShapeDtypeStruct((1, 1, 1, 8 * 128), "float32")
    learns = lambda m: bool(jax.eval_shape(m.activation.build("activation").init, token))  # noqa: E731
    kinds = {methods: learns(methods) for methods in set(model.bound.values())}
    return [site for site, methods in model.bound.items() if kinds[methods]]


def full_precision(model: Model) -> Model:
    """The same model without a policy: one stack of layers, nothing learned beside the weights."""
    return Model(model.config, Policy(), axes=model.axes, remat=model.remat, unroll=model.unroll)


def _like(tree: Any, wanted: Any) -> Any:
    """The leaves of `tree` that `wanted` has, laid out as there."""
    if isinstance(wanted, dict):
        return {name: _like(tree[name], wanted[name]) for name in wanted}
    return jax.sharding.reshard(tree, wanted.sharding.spec)


def plain_params(params: Params, model: Model) -> Params:
    """The parameters of `full_precision(model)` among those of `model`."""
    wanted = full_precision(model).abstract()
    whole = f"layers_0_{model.config.layers}"
    stacks = [
        _like(params[f"layers_{start}_{stop}"], wanted[whole])
        for start, stop in segments(model.bound, model.config.layers)
    ]
    tree = {name: params[name] for name in params if not name.startswith("layers_")}
    tree[whole] = jax.tree.map(lambda *parts: jnp.concatenate(parts), *stacks)
    return _like(tree, wanted)


def _reducer(methods: set[Method], probabilities: bool) -> Callable[[Any], dict[str, Any]]:
    """A value at a site -> what each of the methods there starts from."""

    def start(x: Any) -> dict[str, Any]:
        if probabilities:
            q, k = (jax.sharding.reshard(y, jax.P(*[None] * 4))[:SEQUENCES] for y in x)
            allowed = jnp.tri(q.shape[1], dtype=bool)[None, None]
            x = jax.vmap(lambda q, k: softmax_weights(attention_scores(q, k), allowed))(q, k.swapaxes(1, 2))
            x = x.reshape(-1, *x.shape[2:])
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return {str(m): m.build("activation").init(x) for m in methods}

    return start


def calibrate(model: Model, params: Params, tokens: Int[Array, "b t"], sites: Container[str] | None = None) -> Params:
    """`params` with what the activation quantizers of `sites` (all) learn started from this batch.

    The batch passes in full precision, as the latent weights are; every site sees what it would quantize.
    """
    chosen = [site for site in learned_sites(model) if sites is None or site in sites]
    if not chosen:
        return params
    by_name: dict[str, set[Method]] = {}
    for site in chosen:
        by_name.setdefault(_name(site), set()).add(model.bound[site].activation)
    wanted = {_tap(name): _reducer(methods, name == "attn.probs") for name, methods in by_name.items()}

    @jax.jit
    def filled(params: Params, tokens: Array) -> Params:
        _, found = full_precision(model).features(plain_params(params, model), tokens, wanted=wanted)
        out = jax.tree.map(lambda x: x, params)
        if "head" in chosen:
            _put(out, ("head",), found["head"][str(model.bound["head"].activation)])
        for start, stop in segments(model.bound, model.config.layers):
            for name in BLOCK_SITES:
                if f"layers.{start}.{name}" in chosen:
                    method = model.bound.get(f"layers.{start}.{name}", Methods()).activation
                    starts = jax.tree.map(lambda x, a=start, b=stop: x[a:b], found[_tap(name)][str(method)])
                    _put(out, (f"layers_{start}_{stop}", *name.split(".")), starts)
        return out

    with jax.set_mesh(mesh_in_use()):
        return filled(params, tokens)


def _name(site: str) -> str:
    return site.split(".", 2)[2] if site.startswith("layers.") else site


def _tap(name: str) -> str:
    return "attn.qk" if name == "attn.probs" else name


def _put(tree: Params, path: tuple[str, ...], starts: dict[str, Array]) -> None:
    node = tree
    for key in path:
        node = node[key]
    for name, leaf in node["a"].items():
        start = starts[name].astype(leaf.dtype)
        node["a"][name] = jax.sharding.reshard(start.reshape(leaf.shape), jax.typeof(leaf).sharding.spec)
