"""Where the quantized weights of a model lie in its parameters."""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from fbi.model import Model, Params
from fbi.model.config import linear_shapes
from fbi.model.decoder import segments
from fbi.policy import NONE, Methods, Site
from fbi.quant import Method, QParams


class Stack(NamedTuple):
    """The weights of one site of equally treated layers, stacked [layers, in, out]; a lone weight is a stack of one."""

    sites: tuple[str, ...]
    path: tuple[str, ...]
    method: Method

    def read(self, params: Params) -> tuple[Array, QParams]:
        """The latents and what the quantizer learned, each with a leading axis of layers."""
        node: Any = params
        for name in self.path:
            node = node[name]
        w, qparams = (node["w"], node.get("q", {})) if isinstance(node, dict) else (node, {})
        return (w, qparams) if self.path[0].startswith("layers_") else jax.tree.map(lambda x: x[None], (w, qparams))


def stacks(model: Model) -> list[Stack]:
    """Every linear layer of the blocks, the embedding and the head, as far as its weight is quantized."""
    found = []
    for start, stop in segments(model.bound, model.config.layers):
        for site in linear_shapes(model.config):
            names = tuple(f"layers.{layer}.{site}" for layer in range(start, stop))
            found.append(Stack(names, (f"layers_{start}_{stop}", *site.split(".")), _method(model, names[0])))
    found += [Stack((site.name,), (site.name,), _method(model, site.name)) for site in model.sites if _lone(site)]
    return [stack for stack in found if stack.method != NONE]


def _lone(site: Site) -> bool:
    return site.weight is not None and not site.name.startswith("layers.")


def _method(model: Model, site: str) -> Method:
    return model.bound.get(site, Methods()).weight
