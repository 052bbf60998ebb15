"""Expert grouping: the model computes the same, groups are of exactly one size, k-means finds what belongs together."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from fbi.errors import InputError
from fbi.model import Model, ModelConfig, grouping
from fbi.model.convert_layout import leaves
from fbi.model.experts import group, order_error
from fbi.policy import NONE, Methods, Policy
from fbi.quant import REGISTRY, Method

SMALL = {"vocab": 32, "heads": 2, "kv_heads": 2, "head_dim": 16, "context": 64}


ROLES = ("weight", "activation")
TEXTS = [*REGISTRY, "fbi:granularity=output", "lsq:granularity=input", "twn:granularity=output", "quest:block=0"]
BLOCKED = {  # what works in blocks along the contraction axis of down
    "quarot": "block Hadamard rotation",
    "quest": "block Hadamard rotation",
    "bitnet-v2": "Hadamard rotation of the activation",
    "dbllm": "two scales for each group of 128 inputs",
}


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1], ids=["down", "up"])
def test_every_method_computes_the_same_in_another_order_or_is_known_not_to(axis):
    # As many inputs as outputs: no axis of what is learned can be told by its length.
    methods = {text: Method.parse(text) for text in TEXTS}
    errors = {}
    for text, method in methods.items():
        operands = Methods(*(method if role in REGISTRY[method.name].roles else NONE for role in ROLES))
        errors[text] = order_error(operands, (128, 128), axis)
    blocked = BLOCKED if axis == 0 else {}
    assert {text: error for text, error in errors.items() if text not in blocked and error > 1e-5} == {}
    assert {text: error for text, error in errors.items() if text in blocked and error < 0.05} == {}


@pytest.fixture(scope="module")
def flat_tokens():
    return jax.random.randint(jax.random.key(3), (2, 8), 0, SMALL["vocab"])


def test_a_quantized_model_keeps_its_function(x64, drawn, flat_tokens):
    config = ModelConfig(**SMALL, dim=32, ff=64, layers=2, norm="sub", dtype="float64")
    policy = Policy.parse("layers.*.mlp.*: w=fbi;a=absmax")
    model = Model(config, policy)
    params = drawn(model)
    grouped = group(config, params, 16, policy=policy)
    logits, changed = (model.apply(p, flat_tokens) for p in (params, grouped))
    np.testing.assert_allclose(changed, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", BLOCKED)
def test_a_method_that_works_in_blocks_of_neurons_is_named(text, drawn):
    config = ModelConfig(**SMALL, dim=128, ff=128)
    policy = Policy.parse(f"layers.1.mlp.down: {'a' if text == 'bitnet-v2' else 'w'}={text}")
    params = drawn(Model(config, policy))
    with pytest.raises(InputError, match=rf"mlp\.down: .*{text}.* group the full-precision model"):
        group(config, params, policy=policy)
    assert group(config, params, method="contiguous", policy=policy) is params


def test_all_that_is_learned_for_a_neuron_moves_with_it(drawn):
    config = ModelConfig(**SMALL, dim=48, ff=96, norm="sub")
    policy = Policy.parse("layers.1.mlp.*: w=fbi;a=reactnet | layers.0.mlp.*: w=binarymos:experts=3")
    params = jax.tree.map(np.asarray, drawn(Model(config, policy)))
    grouped = group(config, params, 16, "random", seed=5, policy=policy)
    for name in ("layers_0_1", "layers_1_2"):
        old, new = params[name], grouped[name]
        order = [int(np.flatnonzero((old["mlp"]["up"]["w"][0] == column[:, None]).all(0))[0])
                 for column in new["mlp"]["up"]["w"][0].T]  # fmt: skip
        assert sorted(order) == list(range(96))
        assert order != list(range(96))
        moved = {"gate.w": 2, "up.w": 2, "down.w": 1, "sub_norm.scale": 1}
        moved |= {"down.q.alpha": 1, "down.q.beta": 1, "down.a.beta": 3} if name == "layers_1_2" else {}
        experts = {"down.r.gate": 1, "down.r.into": 2, "gate.r.out": 2, "up.r.out": 2}
        moved |= experts if name == "layers_0_1" else {}
        values = dict(leaves(new["mlp"]))
        for path, leaf in leaves(old["mlp"]):
            want = np.take(leaf, order, moved[path]) if path in moved else leaf
            np.testing.assert_array_equal(values.pop(path), want, err_msg=path)
        assert not values
        for part in ("attn", "mlp_norm"):
            np.testing.assert_equal(dict(leaves(new[part])), dict(leaves(old[part])))


@pytest.mark.parametrize("method", ["kmeans", "coactivation", "random"])
def test_float32_models_keep_their_function_and_layout_under_every_grouping(method, drawn, flat_tokens):
    config = ModelConfig(**SMALL, dim=64, ff=96, layers=2)
    model = Model(config)
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])):
        params = drawn(model)
        h = model.features(params, flat_tokens, wanted=["mlp.down"])[1]["mlp.down"]
        seen = np.asarray(h).reshape(2, -1, 96)
        grouped = group(config, params, 16, method, activations=seen)
        logits, changed = (jax.jit(model.apply)(p, flat_tokens) for p in (params, grouped))
        np.testing.assert_allclose(changed, logits, rtol=1e-5, atol=1e-5)
    old, new = params["layers_0_2"]["mlp"]["down"]["w"], grouped["layers_0_2"]["mlp"]["down"]["w"]
    assert new.sharding == old.sharding
    assert new.dtype == old.dtype
    assert not np.array_equal(old, new)
    again = group(config, params, 16, method, activations=seen)
    other = group(config, params, 16, method, seed=1, activations=seen)
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (grouped, again)), strict=True))
    assert not np.array_equal(new, other["layers_0_2"]["mlp"]["down"]["w"])


def planted(rng, width, groups, size, noise=0.05):
    """Columns [width, groups * size] around `groups` random directions, of any length, in random order; their group."""
    label = rng.permutation(np.repeat(np.arange(groups), size))
    centre = rng.standard_normal((groups, width))
    x = centre[label] + noise * rng.standard_normal((groups * size, width))
    return (x * rng.uniform(0.1, 5.0, (len(x), 1))).T.astype(np.float32), label


def test_planted_clusters_come_back_as_experts(drawn):
    config = ModelConfig(**SMALL, dim=64, ff=256, layers=2)
    params = jax.tree.map(np.array, drawn(Model(config)))
    rng = np.random.default_rng(0)
    found = [planted(rng, 64, 8, 32) for _ in range(2)]
    mlp = params["layers_0_2"]["mlp"]
    mlp["gate"]["w"] = np.stack([columns for columns, _ in found])
    mlp["up"]["w"][:, 0] = np.stack([label for _, label in found])  # a mark that travels along
    grouped = group(config, params, 32)
    marks = grouped["layers_0_2"]["mlp"]["up"]["w"][:, 0].reshape(2, 8, 32)
    assert (marks == marks[:, :, :1]).all()
    assert all(set(row) == set(range(8)) for row in marks[:, :, 0])


def test_neurons_that_fire_together_come_together():
    rng = np.random.default_rng(0)
    label = rng.permutation(np.repeat(np.arange(4), 8))
    on = rng.random((200, 4)) < 0.3
    h = on[:, label] * (1 + rng.random((200, 32)))  # a group fires as one
    config = ModelConfig(**SMALL, dim=16, ff=32, layers=1)
    params = {**Model(config).init(0)}
    params["layers_0_1"]["mlp"]["up"]["w"] = jnp.broadcast_to(jnp.asarray(label, jnp.float32), (1, 16, 32))
    grouped = group(config, params, 8, "coactivation", activations=h[None].astype(np.float32))
    marks = np.asarray(grouped["layers_0_1"]["mlp"]["up"]["w"])[0, 0].reshape(4, 8)
    assert (marks == marks[:, :1]).all()
    # At the first token magnitudes are 3, 1, 0, 0: their mean is 1, and 1 is not above it.
    np.testing.assert_array_equal(
        grouping.active(np.array([[3.0, -1, 0, 0], [0, -2, 2, 0]], np.float32)), [[1, 0, 0, 0], [0, 1, 1, 0]]
    )


def spread_within(x, order, size):
    """The sum of squared distances to the means of runs of `size`."""
    runs = grouping.unit(x)[order].reshape(-1, size, x.shape[1])
    return float(np.square(runs - runs.mean(1, keepdims=True)).sum())


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_kmeans_is_tighter_than_random_where_there_is_structure(noise):
    rng = np.random.default_rng(1)
    x = planted(rng, 32, 8, 16, noise)[0].T
    labels = grouping.clustered(grouping.unit(x), 16, rng)
    assert (np.bincount(labels) == 16).all()
    found, by_chance = (spread_within(x, order, 16) for order in (grouping.ordered(labels), rng.permutation(128)))
    assert found < 0.8 * by_chance


@pytest.mark.parametrize(("k", "size", "seed"), [(2, 3, 0), (5, 8, 1), (12, 16, 2), (30, 4, 3), (1, 7, 4), (9, 1, 5)])
def test_the_balanced_assignment_is_the_exact_optimum(k, size, seed):
    rng = np.random.default_rng(seed)
    cost = rng.standard_normal((k * size, k)) ** 2
    cost[:, 0] *= 0.1  # most rows want the first column
    labels = grouping.balanced(cost, size)
    assert (np.bincount(labels, minlength=k) == size).all()
    rows, slots = linear_sum_assignment(np.repeat(cost, size, 1))  # each column as `size` columns
    assert cost[np.arange(k * size), labels].sum() == pytest.approx(cost[rows, slots // size].sum(), rel=1e-12)


def test_the_balanced_assignment_ends_where_all_costs_are_equal():
    np.testing.assert_array_equal(np.bincount(grouping.balanced(np.zeros((12, 4)), 3)), [3, 3, 3, 3])
    same = grouping.clustered(grouping.unit(np.ones((12, 5), np.float32)), 3, np.random.default_rng(0))
    np.testing.assert_array_equal(np.bincount(same), [3, 3, 3, 3])


def test_contiguous_order_follows_first_members():
    # Group 2 comes first, then 0, then 1.
    np.testing.assert_array_equal(grouping.ordered(np.array([2, 0, 2, 1, 0, 1])), [0, 2, 1, 4, 3, 5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"expert": 7}, "expert=7 does not divide the 48 neurons of a layer; use one of [1, 2, 3, 4, 6, 8, 12, 16"),
        ({"expert": 0}, "expert=0 does not divide"),
        ({"expert": 8, "method": "kmean"}, "unknown grouping 'kmean' (did you mean 'kmeans'?)"),
        ({"expert": 8, "method": "coactivation"}, "needs activations [layers, tokens, ff]"),
        ({"expert": 8, "activations": np.zeros((3, 5, 47), np.float32)}, "activations are [3, 5, 47], not [3, tokens"),
        ({"expert": 8, "policy": Policy.parse("fbi")}, "give the config and the policy that they were made with"),
    ],
)
def test_what_cannot_be_grouped_is_named_with_its_remedy(arguments, message, tiny, drawn):
    config = tiny()
    with pytest.raises(InputError, match=re.escape(message)):
        group(config, drawn(Model(config)), **arguments)
