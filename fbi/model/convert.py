"""Weights from elsewhere and to elsewhere, and from one policy to another."""

from typing import Any

import jax
import jax.numpy as jnp

from fbi.errors import InputError
from fbi.model.axes import mesh_in_use
from fbi.model.config import ModelConfig
from fbi.model.convert_gguf import load_gguf as load_gguf
from fbi.model.convert_gguf import smollm2 as smollm2
from fbi.model.convert_hf import load_safetensors as load_safetensors
from fbi.model.convert_hf import save_safetensors as save_safetensors
from fbi.model.convert_layout import leaves, on, some
from fbi.model.decoder import segments
from fbi.model.functional import Model, Params
from fbi.policy import Methods
from fbi.quant import Method

_SHAPE = ("vocab", "dim", "layers", "heads", "kv_heads", "head_dim", "ff", "norm", "tied")


def adapt(params: Params, source: Model, target: Model) -> Params:
    """The weights of `source` as parameters of `target`, which may have another policy, segmentation, mesh or dtype.

    What a quantizer learns starts from each layer's weight, as in `target.init()`; where both models have the same
    method at a site, what it has learned is kept. `InputError` where the two differ in shape.
    """
    _check_shapes(source.config, target.config)
    mesh = mesh_in_use()
    with jax.set_mesh(mesh):
        wanted, given = target.abstract(), source.abstract()
        _check_tree(params, given)
        placed = jax.tree.map(lambda x, leaf: jax.device_put(x, on(mesh, leaf)), params, given)
        return jax.jit(lambda tree: _adapted(tree, source, target, wanted))(placed)


def _adapted(params: Params, source: Model, target: Model, wanted: Params) -> Params:
    layers = target.config.layers
    out = {}
    for name in wanted:
        if not name.startswith("layers_"):
            out[name] = _relearned(params[name], wanted[name], name, source, target)
    for start, stop in segments(target.bound, layers):
        name, pieces = f"layers_{start}_{stop}", []
        for first, last in segments(source.bound, layers):
            low, high = max(start, first), min(stop, last)
            if low < high:
                stack = params[f"layers_{first}_{last}"]
                piece = jax.tree.map(lambda x, a=low - first, b=high - first: jax.lax.slice_in_dim(x, a, b), stack)
                pieces.append(_relearned(piece, wanted[name], f"layers.{low}", source, target))
        out[name] = jax.tree.map(lambda *parts: jnp.concatenate(parts), *pieces)
    return jax.tree.map(_like, out, wanted)


def _like(x: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.sharding.reshard(x, leaf.sharding.spec).astype(leaf.dtype)


def _relearned(tree: Any, wanted: Any, site: str, source: Model, target: Model) -> Any:
    """`tree` (a leaf, a linear layer, or a tree of them, with or without a layer axis) with what `target` learns."""
    if not isinstance(tree, dict):
        return tree
    if "w" not in tree:
        return {name: _relearned(tree[name], wanted[name], f"{site}.{name}", source, target) for name in tree}
    kept = {name: leaf for name, leaf in tree.items() if name != "q"}
    new = _method(target, site)
    if new == _method(source, site):
        return tree
    init = new.build("weight").init
    w = _like(tree["w"], wanted["w"])
    learned = jax.vmap(init)(w) if site.startswith("layers.") else init(w)
    return kept | ({"q": learned} if learned else {})


def _method(model: Model, site: str) -> Method:
    return model.bound.get(site, Methods()).weight


def _check_shapes(source: ModelConfig, target: ModelConfig) -> None:
    pairs = {field: (getattr(source, field), getattr(target, field)) for field in _SHAPE}
    if differing := [f"{field} {a} to {b}" for field, (a, b) in pairs.items() if a != b]:
        raise InputError(f"cannot adapt weights to a model of another shape: {', '.join(differing)}")


def _check_tree(params: Params, wanted: Params) -> None:
    given, needed = ({path: leaf.shape for path, leaf in leaves(tree)} for tree in (params, wanted))
    if differing := [path for path in sorted({*given, *needed}) if given.get(path) != needed.get(path)]:
        raise InputError(f"these are not the parameters of the source model: {some(differing)} differ")
