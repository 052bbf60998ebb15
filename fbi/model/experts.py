"""Expert grouping: the neurons of each MLP put in an order in which every run of `expert` of them is one expert.

The function of the model stays: a neuron is a column of gate and up and a row of down, and takes all that is learned
for it along. LTE, arXiv 2402.06126, section 4.1, after MoEfication, 2110.01786, section 3.2.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fbi.errors import InputError, unknown
from fbi.model import grouping
from fbi.model.axes import mesh_1x1
from fbi.model.config import ModelConfig, linear_shapes
from fbi.model.convert_layout import leaves, some
from fbi.model.functional import Model, Params
from fbi.policy import Methods, Policy
from fbi.quant.quantizer import paired

Host = Float[np.ndarray, "..."]
Split = Callable[[Host, Host | None, int, np.random.Generator], grouping.Labels]
TOKENS = 4  # of the input on which a method is asked whether it minds the order of neurons
SAME = 1e-3  # relative; rounding flips stay below it, another block of neurons is 1e-2 at 8 bits and more below


def _kmeans(vectors: Host, activations: Host | None, size: int, rng: np.random.Generator) -> grouping.Labels:
    """Balanced k-means of the L2-normalised input weights of the neurons, as MoEfication's code."""
    del activations
    return grouping.clustered(grouping.unit(vectors), size, rng)


def _coactivation(vectors: Host, activations: Host | None, size: int, rng: np.random.Generator) -> grouping.Labels:
    """The balanced split that keeps together neurons that are active together.

    With A[t, i] = 1 where |h[t, i]| > mean_j |h[t, j]|, the weight between two neurons is the cosine
    c[i, j] = sum_t A[t, i] A[t, j] / sqrt(sum_t A[t, i] sum_t A[t, j]). At equal sizes the sum of c within groups is
    largest exactly where the columns of A, normalised, lie closest to the means of their groups: balanced k-means.
    """
    del vectors
    if activations is None:
        raise InputError("grouping by coactivation needs activations [layers, tokens, ff]; give them, or use kmeans")
    return grouping.clustered(grouping.unit(grouping.active(activations).T), size, rng)


def _random(vectors: Host, activations: Host | None, size: int, rng: np.random.Generator) -> grouping.Labels:
    """Any balanced split: the baseline."""
    del activations
    return rng.permutation(len(vectors)) // size


def _contiguous(vectors: Host, activations: Host | None, size: int, rng: np.random.Generator) -> grouping.Labels:
    """The neurons as they lie."""
    del activations, rng
    return np.arange(len(vectors)) // size


SPLITS: dict[str, Split] = {
    "kmeans": _kmeans,
    "coactivation": _coactivation,
    "random": _random,
    "contiguous": _contiguous,
}


def group(
    config: ModelConfig,
    params: Params,
    expert: int = 32,
    method: str = "kmeans",
    seed: int = 0,
    activations: Float[np.ndarray, "layers tokens ff"] | Float[Array, "layers tokens ff"] | None = None,
    policy: Policy = Policy(),
) -> Params:
    """`params` of `Model(config, policy)` with the neurons of every MLP permuted, layer by layer; the function stays.

    Afterwards neurons e * expert to (e + 1) * expert - 1 of a layer are its expert e. `method`: `kmeans` on the
    columns of gate (of up, where the MLP has no gate), `coactivation` on `activations` (the inputs of down), `random`,
    or `contiguous`, which changes nothing. The same seed gives the same order; a layer's does not depend on the others.

    Works on the host, one layer at a time; each leaf returns to where it lay. `InputError` where `expert` does not
    divide the width, where `params` are not those of that model and policy, and for a quantizer that minds the order
    of neurons, as one that rotates or shares a scale in blocks of them does: no permutation keeps its function.
    """
    if method not in SPLITS:
        raise unknown("grouping", method, SPLITS)
    if expert < 1 or config.ff % expert:
        divisors = [n for n in range(1, config.ff + 1) if config.ff % n == 0]
        raise InputError(f"expert={expert} does not divide the {config.ff} neurons of a layer; use one of {divisors}")
    if activations is not None and (activations.shape[0], activations.shape[-1]) != (config.layers, config.ff):
        have, want = list(activations.shape), f"[{config.layers}, tokens, {config.ff}]"
        raise InputError(f"activations are {have}, not {want}; take the feature mlp.down of every layer")
    if method == "contiguous":
        return params
    axes = _neuron_axes(config, policy, params)
    out = dict(params)
    for name, stack in params.items():
        if not name.startswith("layers_"):
            continue
        w = np.asarray(stack["mlp"]["gate" if "gate" in stack["mlp"] else "up"]["w"])
        start = int(name.split("_")[1])

        def order(i: int, w: Host = w, start: int = start) -> Int[np.ndarray, " ff"]:
            own = None if activations is None else np.asarray(activations[start + i], np.float32)
            rng = np.random.default_rng([seed, start + i])
            return grouping.ordered(SPLITS[method](w[i].T, own, expert, rng))

        orders = np.stack([order(i) for i in range(len(w))])
        out[name] = jax.tree.map(lambda leaf, axis, o=orders: _moved(leaf, axis, o), stack, axes[name])
    return out


def _moved(leaf: Any, axis: int, orders: Int[np.ndarray, "layers ff"]) -> Any:
    """A stacked leaf with its `axis` in another order in each layer, where it lay; axis 0: it has no neurons."""
    if not axis:
        return leaf
    host = np.asarray(leaf)
    out = np.empty_like(host)
    for i, order in enumerate(orders):
        out[i] = host[i].take(order, axis - 1)
    return jax.device_put(out, leaf.sharding) if isinstance(leaf, jax.Array) else out


def _neuron_axes(config: ModelConfig, policy: Policy, params: Params) -> Any:
    """For each leaf the axis of neurons, 0 where there is none; refuses what cannot be permuted."""
    model = Model(config, policy)
    wide = Model(dataclasses.replace(config, ff=2 * config.ff), policy)
    abstract = model.abstract()
    given, wanted = ({path: leaf.shape for path, leaf in leaves(tree)} for tree in (params, abstract))
    if differing := [path for path in sorted({*given, *wanted}) if given.get(path) != wanted.get(path)]:
        raise InputError(
            f"these are not the parameters of this config under policy '{policy}': {some(differing)} differ; "
            "give the config and the policy that they were made with"
        )
    _check_methods(config, model.bound)
    return _growing(abstract, wide.abstract(), config.ff)


def _growing(tree: Any, wide: Any, width: int) -> Any:
    """For each leaf the axis that is `width` long and doubles in `wide`, 0 where none does (no leaf has it first).

    So what belongs to a neuron is found without naming it, also where another axis is as long. An `InputError` for a
    leaf that follows the width in another way, a router or a scale of a block of neurons.
    """

    def axis(path: Any, leaf: Any, doubled: Any) -> int:
        found = [i for i, (a, b) in enumerate(zip(leaf.shape, doubled.shape, strict=True)) if a != b]
        if not found:
            return 0
        if [leaf.shape[i] for i in found] != [width]:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise InputError(f"{name} is shared by several neurons; group them before it is made")
        return found[0]

    return jax.tree_util.tree_map_with_path(axis, tree, wide)


def _check_methods(config: ModelConfig, bound: Mapping[str, Methods]) -> None:
    """Refuses quantizers under which the order of neurons changes what a layer computes."""
    refused: dict[str, None] = {}
    for site, shape in linear_shapes(config).items():
        if site.startswith("mlp."):
            found = {bound.get(f"layers.{i}.{site}", Methods()) for i in range(config.layers)}
            axis = 0 if site == "mlp.down" else 1
            for methods in sorted(found, key=str):
                if not keeps(methods, shape, axis):
                    refused[f"{site}: w={methods.weight};a={methods.activation}"] = None
    if refused:
        raise InputError(
            f"{', '.join(refused)} treats blocks of neighbouring neurons as one, so that no other order computes the "
            "same; group the full-precision model and quantize it afterwards"
        )


def keeps(methods: Methods, shape: tuple[int, int], axis: int) -> bool:
    """Whether a layer [in, out] computes the same when what lies along `axis` of its weight changes places."""
    return methods == Methods() or order_error(methods, shape, axis) <= SAME


@functools.cache
def order_error(methods: Methods, shape: tuple[int, int], axis: int) -> float:
    """By how much, relative to its output, a layer [in, out] minds the order along `axis` of its weight.

    The method is asked, not listed: random weights, tokens and learned numbers, once as they are and once permuted
    with all that is learned along that axis, and the L2 norm of the difference of the outputs over that of the output.
    Infinite where something learned belongs to several places along the axis.
    """
    weight, activation = methods.build()
    rng = np.random.default_rng(0)

    def learned(w: Array, x: Array) -> dict[str, Any]:
        tree = {"w": w, "x": x, "q": weight.init(w), "a": activation.init(x)}
        # An axis of its own in front: axis 0 of a leaf means that it has no neurons.
        return jax.tree.map(lambda leaf: leaf[None], tree | {"r": weight.around.init(w, jax.random.key(0))})

    def noisy(leaf: Array) -> Array:
        return leaf + (0.1 * leaf + 0.01) * rng.uniform(-1, 1, leaf.shape).astype(leaf.dtype)

    def output(tree: dict[str, Any]) -> Host:
        w, x, q, a, r = (jax.tree.map(lambda leaf: leaf[0], tree[name]) for name in "wxqar")
        for_weight, for_activation = paired(weight, activation)
        x, memo = weight.around.pre(x, r)
        y = for_activation.apply(x, a)[0] @ for_weight.apply(w, q)
        return np.asarray(weight.around.post(y[None], r, memo)[0])

    doubled = (2 * shape[0], shape[1]) if axis == 0 else (shape[0], 2 * shape[1])
    w, x = (rng.standard_normal(s, np.float32) for s in (shape, (1, TOKENS, shape[0])))
    order = rng.permutation(shape[axis])
    with jax.set_mesh(mesh_1x1()):
        like = lambda s: jax.eval_shape(  # noqa: E731
            learned, jax.ShapeDtypeStruct(s, "float32"), jax.ShapeDtypeStruct((1, TOKENS, s[0]), "float32")
        )
        try:
            axes = _growing(like(shape), like(doubled), shape[axis])
        except InputError:
            return float("inf")
        tree = jax.tree.map(noisy, learned(jnp.asarray(w), jnp.asarray(x)))
        moved = jax.tree.map(lambda leaf, where: _moved(leaf, where, order[None]), tree, axes)
        one, other = output(tree), output(moved)
    one = one if axis == 0 else one[:, order]
    return float(np.linalg.norm(other - one) / np.linalg.norm(one))
