"""What is told of a run beside its losses: what its model costs, and where its learned scales are."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fbi.data import Windows
from fbi.model import Model, Params
from fbi.model.decoder import segments
from fbi.optim.groups import is_router, is_scale


def summarize(model: Model, windows: Windows) -> dict[str, Any]:
    """What a model costs and what its text is like: parameters, bits of the block matrices, bytes of a file."""
    report = model.policy.report(model)
    blocks = [row.bits for row in report.rows if row.bits and row.site.startswith("layers.")]
    weights = sum(bits.weights for bits in blocks)
    flat = jax.tree_util.tree_flatten_with_path(model.abstract())[0]
    wide = sum(leaf.size for path, leaf in flat if path[-1].key == "scale" or is_router(path))
    return {
        "parameters": model.parameter_count(),
        "paper_bits_per_weight": sum(bits.paper for bits in blocks) / weights,
        "stored_bits_per_weight": 8 * sum(bits.stored for bits in blocks) / weights,
        "stored_megabytes": (report.stored_bytes + 4 * wide) / 1e6,
        "unigram_entropy": windows.meta["unigram_entropy"],
        "vocab": model.config.vocab,
        "train_tokens": windows.meta["splits"]["train"]["tokens"],
    }


@jax.jit
def _statistics(leaf: jax.Array) -> jax.Array:
    flat = leaf.reshape(leaf.shape[0], -1)
    return jnp.stack([flat.mean(1), flat.std(1), flat.min(1), flat.max(1)], 1)


def scale_rows(model: Model, params: Params, step: int) -> list[dict[str, Any]]:
    """A row for each site with learned scales: mean, std, min and max of each of its leaves."""
    rows: dict[str, dict[str, Any]] = {}
    for start, stop in segments(model.bound, model.config.layers):
        flat, _ = jax.tree_util.tree_flatten_with_path(params[f"layers_{start}_{stop}"])
        for path, leaf in flat:
            names = [entry.key for entry in path]
            if not is_scale(path):
                continue
            operand = {"q": "", "a": "activation.", "r": "around."}[names[-2]]
            whole = jax.sharding.reshard(leaf, jax.P(*[None] * leaf.ndim))
            for layer, numbers in enumerate(np.asarray(_statistics(whole)).tolist(), start):
                site = f"layers.{layer}.{'.'.join(names[:-2])}"
                row = rows.setdefault(site, {"kind": "scales", "step": step, "site": site})
                row[operand + names[-1]] = dict(zip(("mean", "std", "min", "max"), numbers, strict=True))
    return [rows[site] for site in sorted(rows, key=_by_layer)]


def _by_layer(site: str) -> tuple[int, str]:
    found = re.match(r"layers\.(\d+)\.(.*)", site)
    return (int(found[1]), found[2]) if found else (-1, site)
