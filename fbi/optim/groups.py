"""Which parameters are what, told by their path: latent matrices of the blocks, learned leaves of quantizers, the rest.

A path is that of `jax.tree_util.tree_map_with_path` over the nested dicts of `Model.init`.
"""

from collections.abc import Callable
from typing import Any

import jax

QUANTIZERS = ("q", "a", "r")  # of the weight, of the activation, around the product


def names_of(path: tuple) -> list[str]:
    """The keys of a path, such as ['layers_0_2', 'attn', 'q', 'w']."""
    return [entry.key for entry in path]


def is_latent(path: tuple) -> bool:
    """Whether a leaf is a latent matrix `w` of a block; not the embedding, the head, a norm or a scale."""
    names = names_of(path)
    return names[0].startswith("layers_") and names[-1] == "w"


def is_scale(path: tuple) -> bool:
    """Whether a quantizer learned a leaf: it lies under `q`, `a` or `r` and is no weight (as of the site attn.q)."""
    names = names_of(path)
    return len(names) > 1 and names[-2] in QUANTIZERS and names[-1] != "w"


def is_router(path: tuple) -> bool:
    """Whether a leaf is a router's."""
    return "router" in names_of(path)


def mask(kind: Callable[[tuple], bool]) -> Callable[[Any], Any]:
    """A function from parameters to a tree of booleans, as optax's masks are: the leaves whose path is of that kind."""
    return lambda params: jax.tree_util.tree_map_with_path(lambda path, leaf: kind(path), params)
