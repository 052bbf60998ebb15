"""Checkpoints name one tensor a layer, [out, in]; our tree stacks layers, [in, out]: the names, checks, both ways."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jaxtyping import Float

from fbi.errors import InputError
from fbi.model.axes import mesh_in_use
from fbi.model.config import ModelConfig
from fbi.model.functional import Model, Params

Host = Float[np.ndarray, "..."]
_SHOWN = 4  # names in one error

# Ours -> Hugging Face (Llama, Mistral, BitNet), GGUF (llama); {} is the layer.
_NAMES = {
    "embed": ("model.embed_tokens", "token_embd"),
    "norm.scale": ("model.norm", "output_norm"),
    "head.w": ("lm_head", "output"),
    "attn_norm.scale": ("model.layers.{}.input_layernorm", "blk.{}.attn_norm"),
    "mlp_norm.scale": ("model.layers.{}.post_attention_layernorm", "blk.{}.ffn_norm"),
    "attn.sub_norm.scale": ("model.layers.{}.self_attn.attn_sub_norm", "blk.{}.attn_sub_norm"),
    "mlp.sub_norm.scale": ("model.layers.{}.mlp.ffn_sub_norm", "blk.{}.ffn_sub_norm"),
    "attn.q.w": ("model.layers.{}.self_attn.q_proj", "blk.{}.attn_q"),
    "attn.k.w": ("model.layers.{}.self_attn.k_proj", "blk.{}.attn_k"),
    "attn.v.w": ("model.layers.{}.self_attn.v_proj", "blk.{}.attn_v"),
    "attn.o.w": ("model.layers.{}.self_attn.o_proj", "blk.{}.attn_output"),
    "mlp.gate.w": ("model.layers.{}.mlp.gate_proj", "blk.{}.ffn_gate"),
    "mlp.up.w": ("model.layers.{}.mlp.up_proj", "blk.{}.ffn_up"),
    "mlp.down.w": ("model.layers.{}.mlp.down_proj", "blk.{}.ffn_down"),
}
HUGGING_FACE = {ours: f"{names[0]}.weight" for ours, names in _NAMES.items()}
GGUF = {ours: f"{names[1]}.weight" for ours, names in _NAMES.items()}


class Stored(NamedTuple):
    """A tensor of a checkpoint: its shape there, and how to read it as floating-point numbers."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class Place(NamedTuple):
    """Where a leaf of our tree lies: `layers_2_5.attn.q.w` is `attn.q.w` of layers 2, 3, 4; others have no layers."""

    name: str
    layers: range | None

    @classmethod
    def of(cls, path: str) -> "Place":
        """Reads the path of a leaf."""
        found = re.fullmatch(r"layers_(\d+)_(\d+)\.(.*)", path)
        return cls(found[3], range(int(found[1]), int(found[2]))) if found else cls(path, None)

    @property
    def learned(self) -> bool:
        """Whether it is a number that a quantizer learns (`attn.q.q.alpha`), not a weight."""
        return re.search(r"\.[qar]\.(?!w$)[^.]+$", self.name) is not None

    def named(self, names: Mapping[str, str]) -> list[str]:
        """What a checkpoint calls it, layer by layer."""
        return [names[self.name]] if self.layers is None else [names[self.name].format(i) for i in self.layers]


def leaves(tree: Params) -> Iterator[tuple[str, Any]]:
    """Every leaf with its dotted path."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def some(names: Iterable[str]) -> str:
    """A few names for an error, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def _as_stored(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[::-1] if name.endswith(".w") else shape


def check(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, str], where: str) -> None:
    """Refuses tensors that are not exactly those of a model with this config, naming what differs."""
    wanted: dict[str, tuple[int, ...]] = {}
    for path, leaf in leaves(Model(config).abstract()):
        place = Place.of(path)
        shape = leaf.shape if place.layers is None else leaf.shape[1:]
        wanted |= dict.fromkeys(place.named(names), _as_stored(place.name, shape))
    extra = [name for name in shapes if name not in wanted]
    if biases := [name for name in extra if name.endswith(".bias")]:
        raise InputError(f"{where} has biases, which this model does not: {some(biases)}")
    if missing := [name for name in wanted if name not in shapes]:
        raise InputError(f"{where} lacks {len(missing)} tensors that its config asks for: {some(missing)}")
    if extra:
        raise InputError(f"{where} has {len(extra)} tensors that its config does not explain: {some(extra)}")
    wrong = [f"{n} is {list(shapes[n])}, not {list(shape)}" for n, shape in wanted.items() if shapes[n] != shape]
    if wrong:
        raise InputError(f"{where} has shapes that its config does not give: {some(wrong)}")


def assemble(config: ModelConfig, stored: Mapping[str, Stored], names: Mapping[str, str], where: str) -> Params:
    """The tree of `Model(config).init()` with a checkpoint's numbers, each leaf read and placed in its turn."""
    check(config, {name: tensor.shape for name, tensor in stored.items()}, names, where)
    abstract = Model(config).abstract()
    mesh = mesh_in_use()
    filled = []
    for path, leaf in leaves(abstract):
        place = Place.of(path)
        parts = [_turned(place.name, stored[name].read()).astype(leaf.dtype) for name in place.named(names)]
        host = parts[0] if place.layers is None else np.stack(parts)
        filled.append(jax.make_array_from_callback(host.shape, on(mesh, leaf), lambda index, host=host: host[index]))
    return jax.tree.unflatten(jax.tree.structure(abstract), filled)


class Weight(NamedTuple):
    """One weight of one layer: its site in a policy (a norm has a like name), a checkpoint's name, the numbers."""

    site: str
    name: str
    value: Host  # as ours, [in, out]
    learned: dict[str, Host]  # what its quantizer learned

    @property
    def stored(self) -> Host:
        """The weight as a checkpoint keeps it."""
        return np.ascontiguousarray(self.value.T if self.value.ndim == 2 and self.site != "embed" else self.value)


def disassemble(params: Params, names: Mapping[str, str]) -> Iterator[Weight]:
    """Every weight of the tree, layer by layer."""
    hosts = {path: np.asarray(leaf) for path, leaf in leaves(params)}
    for path, host in hosts.items():
        place = Place.of(path)
        if place.learned:
            continue
        if place.name not in names:
            raise InputError(f"parameter {path} has no place in a checkpoint of this kind")
        prefix = f"{path.removesuffix('.w')}.q."
        learned = {p.removeprefix(prefix): x for p, x in hosts.items() if p.startswith(prefix) and Place.of(p).learned}
        site, named = place.name.removesuffix(".w"), place.named(names)
        if place.layers is None:
            yield Weight(site, named[0], host, learned)
        else:
            for row, (i, name) in enumerate(zip(place.layers, named, strict=True)):
                yield Weight(f"layers.{i}.{site}", name, host[row], {k: x[row] for k, x in learned.items()})


def _turned(name: str, tensor: np.ndarray) -> np.ndarray:
    return tensor.T if name.endswith(".w") else tensor


def on(mesh: jax.sharding.Mesh, leaf: jax.ShapeDtypeStruct) -> jax.sharding.NamedSharding:
    """Where a leaf of `Model.abstract()` lies on the devices of a mesh."""
    return jax.sharding.NamedSharding(mesh, cast(jax.sharding.NamedSharding, leaf.sharding).spec)
