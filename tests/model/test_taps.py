"""Features by site name: what they are, stacked over layers, on any mesh, and free where nothing is wanted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbi.errors import InputError
from fbi.model import Model, taps
from fbi.model.axes import mesh_1x1
from fbi.policy import Policy

MIXED = "layers.{0,-1}.*: w=none | layers.*: w=bitnet-b158"  # three segments in three layers
ALL = ("layers.*.*", "layers.*.out", "head")


def layer(params, index):
    """The parameters of one layer, from whichever segment holds it."""
    for name, stack in params.items():
        if name.startswith("layers_"):
            start, stop = map(int, name.split("_")[1:])
            if start <= index < stop:
                return jax.tree.map(lambda leaf: np.asarray(leaf[index - start], np.float64), stack)
    raise AssertionError(index)


def rms(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * np.asarray(scale, np.float64)


def close(found, expected, tolerance=1e-4):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("changes", [{}, {"norm": "inner"}, {"tied": True}], ids=str)
def test_features_are_the_values_that_make_the_logits(changes, tiny, tokens, drawn):
    config = tiny(kv_heads=2, **changes)
    model = Model(config, Policy.parse(MIXED))
    params = drawn(model)
    logits, found = model.features(params, tokens, wanted=ALL)
    assert set(found) == set(taps.names(config))
    x = np.asarray(params["embed"], np.float64)[np.asarray(tokens)]
    for i in range(config.layers):
        at = layer(params, i)
        for block, names in (("attn", "qkv"), ("mlp", ("gate", "up"))):
            for name in names:
                site = f"{block}.{name}"
                scale = at[block][name]["norm"]["scale"] if config.norm == "inner" else at[f"{block}_norm"]["scale"]
                # The input is what follows the norm; full-precision layers multiply it by the weight as it is.
                close(found[site][i], rms(x, scale, config.eps))
                if i != 1:
                    close(found[f"{site}.out"][i], np.asarray(found[site][i], np.float64) @ at[block][name]["w"])
            x = x + np.asarray(found[f"{block}.{'o' if block == 'attn' else 'down'}.out"][i], np.float64)
        gate, up = (np.asarray(found[f"mlp.{name}.out"][i], np.float64) for name in ("gate", "up"))
        hidden = gate / (1 + np.exp(-gate)) * up
        close(found["mlp.down"][i], rms(hidden, at["mlp"]["down"]["norm"]["scale"], config.eps)
              if config.norm == "inner" else hidden)  # fmt: skip
        close(found["out"][i], x)
    close(found["head"], rms(x, params["norm"]["scale"], config.eps))
    table = np.asarray(params["embed"]).T if config.tied else np.asarray(params["head"]["w"])
    close(logits, np.asarray(found["head"], np.float64) @ table, 1e-3)
    assert found["attn.k.out"].shape == (3, *tokens.shape, 16)


def test_the_logits_are_those_of_apply_bit_for_bit(tiny, tokens, drawn):
    model = Model(tiny(), Policy.parse(MIXED))
    params = drawn(model)
    np.testing.assert_array_equal(model.features(params, tokens, wanted=["out"])[0], model.apply(params, tokens))
    assert model.features(params, tokens)[1] == {}


def scans(jaxpr):
    """The number of outputs of every scan of a program."""
    return [len(eqn.outvars) for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "scan"]


def test_what_is_not_wanted_leaves_no_trace_in_the_program(tiny, tokens, drawn):
    model = Model(tiny(), Policy.parse(MIXED))
    with jax.set_mesh(mesh_1x1()):
        params = drawn(model)
        traced = lambda *wanted: jax.make_jaxpr(lambda p, t: model.features(p, t, wanted=wanted))(params, tokens)
        assert scans(traced()) == [1, 1, 1]  # the residual stream alone
        assert scans(traced("layers.*.out")) == [2, 2, 2]
        assert scans(traced("layers.*.attn.{q,k}.out", "head")) == [3, 3, 3]


def test_reducers_are_applied_in_the_layer(tiny, tokens, drawn):
    model = Model(tiny(), Policy.parse(MIXED))
    params = drawn(model)
    peak = lambda x: {"peak": jnp.abs(x).max(), "mean": x.mean((0, 1))}
    _, found = model.features(params, tokens, wanted={"layers.*.mlp.{up,down}": peak, "out": jnp.max, "head": jnp.min})
    _, whole = model.features(params, tokens, wanted=["mlp.*", "out", "head"])
    assert set(found) == {"mlp.up", "mlp.down", "out", "head"}
    assert found["mlp.down"]["mean"].shape == (3, 48)
    close(found["mlp.up"]["peak"], np.abs(whole["mlp.up"]).max((1, 2, 3)), 1e-6)
    close(found["mlp.down"]["mean"], np.mean(whole["mlp.down"], (1, 2)), 1e-5)
    close(found["out"], np.max(whole["out"], (1, 2, 3)), 1e-6)
    close(found["head"], np.min(whole["head"]), 1e-6)


def test_gradients_flow_through_features_with_and_without_recomputation(tiny, tokens, drawn):
    direction = jax.random.normal(jax.random.key(3), (3, *tokens.shape, 32))
    found = []
    for remat in (False, True):
        model = Model(tiny(), Policy.parse(MIXED), remat=remat)
        params = drawn(model)

        def objective(p, model=model):
            return jnp.sum(direction * model.features(p, tokens, wanted=["out"])[1]["out"])

        found.append(jax.jit(jax.grad(objective))(params))
    jax.tree.map(lambda a, b: close(a, b, 1e-3), *found)
    assert not np.any(found[0]["head"]["w"])  # features come before the head
    # The last block's residual stream is the sum of what the blocks add: the slope along w of mlp.down by differences.
    w = params["layers_2_3"]["mlp"]["down"]["w"]
    step = 1e-2 * jax.random.normal(jax.random.key(4), w.shape)
    moved = [jax.tree.map(lambda x: x, params) for _ in range(2)]
    for tree, sign in zip(moved, (1, -1), strict=True):
        tree["layers_2_3"]["mlp"]["down"]["w"] = w + sign * step
    slope = float(objective(moved[0]) - objective(moved[1])) / 2
    assert slope == pytest.approx(float(jnp.sum(step * found[0]["layers_2_3"]["mlp"]["down"]["w"])), rel=1e-2)


@pytest.mark.slow
def test_features_are_the_same_on_a_mesh_and_lie_as_the_values_do(tiny, tokens, x64):
    config = dataclasses.replace(tiny(), dtype="float64")
    model = Model(config, Policy.parse(MIXED))
    batch = np.tile(np.asarray(tokens), (2, 1))
    found = []
    for shape in ((1, 1), (4, 2)):
        mesh = jax.make_mesh(shape, ("data", "model"), devices=jax.devices()[: shape[0] * shape[1]])
        with jax.set_mesh(mesh):
            rows = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data", None)))
            found.append(jax.jit(lambda p, t: model.features(p, t, wanted=ALL)[1])(model.init(0), rows))
    for name, value in found[1].items():
        np.testing.assert_allclose(value, found[0][name], rtol=0, atol=1e-9, err_msg=name)
    assert found[1]["attn.q.out"].sharding.spec == jax.P(None, "data", None, "model")
    assert found[1]["out"].sharding.spec == jax.P(None, "data", None, None)


def test_a_collector_takes_what_it_wants_and_the_innermost_takes_it():
    x = jnp.arange(3.0)
    assert taps.tap("a", x) is x  # nobody collects
    with taps.collect({"a": taps.identity, "b": jnp.sum}) as outer:
        assert taps.tap("a", x) is x
        with taps.collect({"b": jnp.max}) as inner:
            taps.tap("a", 2 * x)
            taps.tap("b", x)
        taps.tap("b", x)
        taps.tap("c", x)
    taps.tap("a", 3 * x)
    assert outer["a"] is x
    assert {name: float(value.sum()) for name, value in outer.items()} == {"a": 3.0, "b": 3.0}
    assert {name: float(value) for name, value in inner.items()} == {"b": 2.0}


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (["layers.*.out"], ["out"]),
        ("layers.*.attn.q.out", ["attn.q.out"]),
        (["out", "head"], ["out", "head"]),
        (["layers.*.attn.{q,k,v}"], ["attn.q", "attn.k", "attn.v"]),
        (["*.out"], [f"{site}.out" for site in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up",
                                                "mlp.down")]),
        ([], []),
    ],
)  # fmt: skip
def test_a_name_stands_for_the_sites_that_it_matches(wanted, names, tiny):
    assert sorted(taps.resolve(tiny(), wanted)) == sorted(names)


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (["layers.*.attn.qq"], r"unknown feature 'layers.\*.attn.qq' \(did you mean 'layers.\*.attn.q'\?\); valid: "
                               r"head, "
                               r"layers.\*.attn.k, layers.\*.attn.k.out"),
        (["layers.0.out"], r"unknown feature 'layers.0.out'"),
        (["layers.*.head"], r"unknown feature 'layers.\*.head'"),
        (["embed"], "unknown feature 'embed'"),
        (["layers.*.{attn"], "unbalanced or nested braces"),
    ],
)  # fmt: skip
def test_an_unknown_name_is_refused_with_those_there_are(wanted, says, tiny, tokens):
    with pytest.raises(InputError, match=says):
        Model(tiny()).features({}, tokens, wanted=wanted)
