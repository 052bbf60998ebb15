import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbi import quant
from fbi.errors import InputError
from fbi.model import Model
from fbi.model.convert import adapt
from fbi.policy import Policy

BY_DEPTH = "layers.{0,-1}.*: w=none | layers.*.mlp.*: w=fbi"


def under(config, policy="fp", **options):
    return Model(config, Policy.parse(policy), **options)


def test_layers_are_restacked_and_the_logits_of_full_precision_stay(tiny, tokens, drawn, equal):
    config = tiny(kv_heads=2)
    whole, cut = under(config), under(config, "layers.1.attn.q: a=absmax:bits=8 | layers.2.*: w=none")
    params = drawn(whole)
    restacked = adapt(params, whole, cut)
    assert [key for key in restacked if key.startswith("layers")] == ["layers_0_1", "layers_1_2", "layers_2_3"]
    for layer in range(3):
        part = restacked[f"layers_{layer}_{layer + 1}"]
        equal(part, jax.tree.map(lambda x, i=layer: x[i : i + 1], params["layers_0_3"]))
    equal(adapt(restacked, cut, whole), params)
    equal(adapt(params, whole, whole), params)
    expected = whole.apply(params, tokens)
    np.testing.assert_array_equal(whole.apply(adapt(restacked, cut, whole), tokens), expected)


@pytest.mark.parametrize("policy", ["fbi", BY_DEPTH, "{head,layers.1.attn.o}: w=fbi:granularity=output"])
def test_what_quantizers_learn_starts_from_the_weight_of_each_layer(policy, tiny, drawn, equal):
    source, target = under(tiny()), under(tiny(), policy)
    params = drawn(source)
    adapted = adapt(params, source, target)
    checked = 0
    for site, methods in target.bound.items():
        if methods.weight.name == "none":
            continue
        *layer, block, name = site.split(".") if site != "head" else ("head", "head")
        if site == "head":
            w, q = params["head"]["w"], adapted["head"]["q"]
        else:
            number = int(layer[1])
            w = params["layers_0_3"][block][name]["w"][number]
            key = next(k for k in adapted if k[:6] == "layers" and number in range(*map(int, k.split("_")[1:])))
            row = number - int(key.split("_")[1])
            q = jax.tree.map(lambda x, row=row: x[row], adapted[key][block][name]["q"])
        expected = quant.quantizer(str(methods.weight), role="weight").init(jnp.asarray(w))
        assert set(q) == {"alpha", "beta"}
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), q, expected)
        checked += 1
    assert checked > 0
    equal(
        jax.tree.map(lambda x: (x.shape, str(x.dtype)), adapted),
        jax.tree.map(lambda x: (x.shape, str(x.dtype)), target.abstract()),
    )
    equal(adapt(adapted, target, source), params)


def test_what_was_learned_is_kept_where_the_method_stays_and_dropped_where_it_goes(tiny, drawn, equal):
    source = under(tiny(), "layers.2.*: w=none | layers.*.{attn.q,mlp.up}: w=fbi")
    target = under(tiny(), "layers.0.attn.q: w=fbi:shift=false | layers.*.attn.q: w=fbi")
    params = drawn(source)
    adapted = adapt(params, source, target)
    old, first, rest = params["layers_0_2"], adapted["layers_0_1"], adapted["layers_1_3"]
    assert set(first["attn"]["q"]["q"]) == {"alpha"}
    assert "q" not in rest["mlp"]["up"]
    for name in ("alpha", "beta"):
        equal(rest["attn"]["q"]["q"][name][:1], old["attn"]["q"]["q"][name][1:])
    w = np.asarray(params["layers_2_3"]["attn"]["q"]["w"][0])
    np.testing.assert_allclose(rest["attn"]["q"]["q"]["beta"][1], w.mean(1, keepdims=True), rtol=1e-5, atol=1e-7)
    equal(adapt(params, source, source), params)


def test_an_adapted_student_runs_close_to_its_teacher_when_its_grid_is_fine(tiny, tokens, drawn):
    source, target = under(tiny(tied=True)), under(tiny(tied=True), "layers.*: w=absmax:bits=8")
    params = drawn(source)
    expected = np.asarray(source.apply(params, tokens))
    logits = target.apply(adapt(params, source, target), tokens)
    assert 0 < np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("shape", [(8, 1), (2, 2), (1, 4)])
def test_on_every_mesh_the_parameters_are_the_same_and_lie_where_the_mesh_keeps_them(shape, tiny, drawn):
    source, target = under(tiny()), under(tiny(), BY_DEPTH)
    params = drawn(source)  # on one device
    expected = adapt(params, source, target)
    with jax.set_mesh(jax.make_mesh(shape, ("data", "model"), devices=jax.devices()[: shape[0] * shape[1]])):
        adapted = adapt(params, source, target)
        for x, leaf in zip(jax.tree.leaves(adapted), jax.tree.leaves(target.abstract()), strict=True):
            assert x.sharding.spec == leaf.sharding.spec
            assert x.sharding.mesh == jax.sharding.get_mesh()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-6, atol=1e-8),
                 adapted, expected)  # fmt: skip


def test_another_compute_type_takes_the_weights_along(tiny, drawn, x64):
    source, target = under(tiny()), under(tiny(dtype="float64", context=8, init_std=1.0), "fbi")
    adapted = adapt(drawn(source), source, target)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapted)} == {np.dtype("float64")}
    w = np.asarray(adapted["layers_0_3"]["mlp"]["up"]["w"])
    np.testing.assert_allclose(adapted["layers_0_3"]["mlp"]["up"]["q"]["beta"], w.mean(2, keepdims=True), atol=1e-14)


def test_another_shape_and_foreign_parameters_are_refused_by_name(tiny, drawn):
    source = under(tiny())
    params = drawn(source)
    with pytest.raises(InputError, match="another shape: layers 3 to 2, ff 48 to 40, tied False to True"):
        adapt(params, source, under(tiny(layers=2, ff=40, tied=True)))
    with pytest.raises(InputError, match=r"another shape: kv_heads 4 to 2$"):
        adapt(params, source, under(tiny(kv_heads=2)))
    with pytest.raises(InputError, match=r"not the parameters of the source model: .*alpha.* and \d+ more differ"):
        adapt(params, under(tiny(), "fbi"), source)
