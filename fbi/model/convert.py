"""Weights from elsewhere and to elsewhere, and from one policy to another."""

from typing import Any

import jax
import jax.numpy as jnp

from fbi.errors import InputError
from fbi.model.axes import mesh_in_use
from fbi.model.config import UNTRAINED, ModelConfig
from fbi.model.convert_gguf import load_gguf as load_gguf
from fbi.model.convert_gguf import smollm2 as smollm2
from fbi.model.convert_hf import load_safetensors as load_safetensors
from fbi.model.convert_hf import save_safetensors as save_safetensors
from fbi.model.convert_layout import leaves, on, some
from fbi.model.decoder import segments
from fbi.model.functional import Model, Params
from fbi.policy import Methods

_SHAPE = ("vocab", "dim", "layers", "heads", "kv_heads", "head_dim", "ff", "norm", "tied", "gated")
_ROUTER = "router"


def adapt(params: Params, source: Model, target: Model, seed: int = 0) -> Params:
    """The weights of `source` as parameters of `target`, which may have another policy, segmentation, mesh or dtype.

    What a quantizer learns starts from each layer's weight, as in `target.init()`; where both models have the same
    method at a site, what it has learned is kept. Routers are kept, or start as in `target.init(seed)` where `source`
    has none and `target` trains them; a dense `target` has no place for them. `InputError` where the two differ in
    shape, or where `target` needs trained routers.
    """
    _check_shapes(source.config, target.config)
    check_routers(source.config, target.config)
    mesh = mesh_in_use()
    with jax.set_mesh(mesh):
        wanted, given = target.abstract(), source.abstract()
        _check_tree(params, given)
        placed = jax.tree.map(lambda x, leaf: jax.device_put(x, on(mesh, leaf)), params, given)
        return jax.jit(lambda tree: _adapted(tree, source, target, wanted, seed))(placed)


def _adapted(params: Params, source: Model, target: Model, wanted: Params, seed: int) -> Params:
    layers = target.config.layers
    made = target.fresh(jax.random.key(seed))
    out = {}
    for name in wanted:
        if not name.startswith("layers_"):
            out[name] = _relearned(params.get(name, {}), wanted[name], made[name], name, source, target)
    for start, stop in segments(target.bound, layers):
        name, pieces = f"layers_{start}_{stop}", []
        for first, last in segments(source.bound, layers):
            low, high = max(start, first), min(stop, last)
            if low < high:
                stack = params[f"layers_{first}_{last}"]
                piece = jax.tree.map(lambda x, a=low - first, b=high - first: jax.lax.slice_in_dim(x, a, b), stack)
                fresh = jax.tree.map(lambda x, a=low - start, b=high - start: x[a:b], made[name])
                pieces.append(_relearned(piece, wanted[name], fresh, f"layers.{low}", source, target))
        placed = lambda x, leaf: jax.sharding.reshard(x, leaf.sharding.spec)  # noqa: E731
        laid = [jax.tree.map(placed, piece, wanted[name]) for piece in pieces]
        out[name] = jax.tree.map(lambda *parts: jnp.concatenate(parts), *laid)
    return jax.tree.map(_like, out, wanted)


def _like(x: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.sharding.reshard(x, leaf.sharding.spec).astype(leaf.dtype)


def _relearned(tree: Any, wanted: Any, made: Any, site: str, source: Model, target: Model) -> Any:
    """`tree` (a leaf, a linear layer, or a tree of them, with or without a layer axis) with what `target` learns.

    `made` are fresh parameters of the target: the start of what an activation quantizer learns, and of routers.
    """
    if not isinstance(wanted, dict):
        return tree
    (weight, activation), (new_weight, new_activation) = _methods(source, site), _methods(target, site)
    out: dict[str, Any] = {}
    for name in wanted:
        if name == _ROUTER and name not in tree:
            out[name] = made[name]
        elif not learned_name(name, wanted[name]):
            child = tree.get(name, {}) if isinstance(tree, dict) else tree
            out[name] = _relearned(child, wanted[name], made[name], f"{site}.{name}", source, target)
        elif name in tree and (activation == new_activation if name == "a" else weight == new_weight):
            out[name] = tree[name]
        elif name == "a":
            out[name] = made[name]
        else:
            quantizer = new_weight.build("weight")
            start = quantizer.init if name == "q" else lambda w, q=quantizer: q.around.init(w, jax.random.key(0))
            w = _like(tree["w"], wanted["w"])
            out[name] = jax.vmap(start)(w) if site.startswith("layers.") else start(w)
    return out


def learned_name(name: str, tree: Any) -> bool:
    """Whether the entry `name` of a linear layer is what its quantizers learn, not the projection of that name."""
    return name in ("q", "a", "r") and isinstance(tree, dict) and "w" not in tree


def _methods(model: Model, site: str) -> Methods:
    return model.bound.get(site, Methods())


def _check_shapes(source: ModelConfig, target: ModelConfig) -> None:
    pairs = {field: (getattr(source, field), getattr(target, field)) for field in _SHAPE}
    if differing := [f"{field} {a} to {b}" for field, (a, b) in pairs.items() if a != b]:
        raise InputError(f"cannot adapt weights to a model of another shape: {', '.join(differing)}")


def check_routers(source: ModelConfig, target: ModelConfig) -> None:
    """Refuses weights whose routers `target` cannot use: of experts of another size, or none where they are frozen."""
    if source.expert and target.expert and source.expert != target.expert:
        raise InputError(
            f"cannot adapt routers of experts of {source.expert} neurons to experts of {target.expert}; "
            f"use model.expert={source.expert}, or start from the dense run"
        )
    if source.expert and target.expert and target.router not in (source.router, "oracle"):
        raise InputError(
            f"cannot adapt routers of the kind {source.router} to {target.router}; use model.router={source.router}, "
            "or start from the dense run"
        )
    if target.routing == "hard" and not source.expert and target.router not in UNTRAINED:
        raise InputError(
            "model.routing=hard freezes the routers, and the weights to start from have none; train them first in a "
            "run with model.routing=soft (LTE's stage 1), and start from that"
        )


def _check_tree(params: Params, wanted: Params) -> None:
    given, needed = ({path: leaf.shape for path, leaf in leaves(tree)} for tree in (params, wanted))
    if differing := [path for path in sorted({*given, *needed}) if given.get(path) != needed.get(path)]:
        raise InputError(f"these are not the parameters of the source model: {some(differing)} differ")
