"""Every registered method inside a decoder: real steps, every mesh alike, learned activations from one batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fbi
from fbi.loss import Loss
from fbi.model.calibrate import calibrate, learned_sites
from fbi.model.linear import Linear
from fbi.policy import Methods
from fbi.quant import REGISTRY, Ctx, Method
from fbi.quant.registry import listed
from fbi.train.step import init_state, make_step

TINY = {"vocab": 64, "dim": 128, "heads": 2, "kv_heads": 2, "head_dim": 64, "ff": 128}


def widths():
    """Each method as it stands, and at its lowest and its highest bit-width."""
    for name, entry in REGISTRY.items():
        bits = listed(entry.options["bits"]) if "bits" in entry.options else ()
        ends = {bits[0], bits[-1]} - {entry.options["bits"].default} if bits else ()
        yield from (Method(name), *(Method(name, bits=b) for b in sorted(ends)))


ALL = list(widths())
NAMES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
SITES = [f"layers.{layer}.{name}" for layer in range(2) for name in NAMES]
GROUP = len(SITES)  # methods in a decoder, a site each: one compilation serves them


def rule(site, method):
    operands = [f"{o}={method}" for o, r in (("w", "weight"), ("a", "activation")) if r in REGISTRY[method.name].roles]
    return f"{site}: {';'.join(operands)}"


@pytest.mark.parametrize("first", range(0, len(ALL), GROUP))
def test_each_method_takes_three_steps_and_learns(first):
    methods = dict(zip(SITES, ALL[first : first + GROUP], strict=False))
    policy = " | ".join(rule(site, method) for site, method in methods.items())
    model = fbi.model("nano", policy, layers=2, **TINY)
    tx = optax.adam(2e-3)
    text = np.frombuffer((fbi.__doc__ or "").encode() * 9, np.uint8)[: 4 * 17].reshape(4, 17) % 64
    with jax.set_mesh(jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1])):
        tokens = jnp.asarray(text, jnp.int32)
        state = init_state(model, tx, jax.random.key(0))
        state["params"] = calibrate(model, state["params"], tokens[:, :-1])
        before = jax.tree.map(np.asarray, state["params"])
        step = make_step(model, Loss.parse("ce"), tx)
        losses = []
        for i in range(3):
            state, sums = step(state, None, tokens, jnp.float32(i / 3))
            losses.append(float(sums["loss"]) / float(sums["count"]))
        after = jax.tree.map(np.asarray, state["params"])
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    for site, method in methods.items():
        _, layer, part, name = site.split(".")
        stacks = [tree[f"layers_{layer}_{int(layer) + 1}"] for tree in (before, after)]
        old, new = (stack[part][name] for stack in stacks)
        for path, leaf in jax.tree_util.tree_flatten_with_path(new)[0]:
            assert np.isfinite(leaf).all(), (str(method), path)
        if "weight" in REGISTRY[method.name].roles:
            assert not np.array_equal(old["w"], new["w"]), str(method)


@pytest.mark.parametrize("name", REGISTRY)
def test_every_mesh_gives_the_same_layer_and_gradients_in_float64(name, x64):
    roles = REGISTRY[name].roles
    methods = Methods(*(Method(name) if role in roles else Method("none") for role in ("weight", "activation")))
    x = np.random.default_rng(0).standard_normal((4, 3, 256))

    def run(sizes):
        mesh = jax.make_mesh(sizes, ("data", "model"), devices=jax.devices()[: sizes[0] * sizes[1]])
        found = []
        with jax.set_mesh(mesh):
            for spec, across, out in (
                (jax.P("data", "model"), jax.P("data", None, None), jax.P("data", None, "model")),
                (jax.P("model", "data"), jax.P("data", None, "model"), jax.P("data", None, None)),
            ):

                @jax.jit
                def whole(x, spec=spec, across=across, out=out):
                    kind = {"std": 0.1, "spec": spec, "dtype": jnp.dtype("float64"), "norm": None, "site": "mlp.up"}
                    layer = Linear((256, 256), methods, rngs=nnx.Rngs(0), **kind)
                    graph, params = nnx.split(layer, nnx.Param)
                    params = jax.tree.map(lambda p: p + 0.013, params)  # off the kink of a PReLU at a sum of zero

                    def total(params, x):
                        y = nnx.merge(graph, params)(x, out, Ctx(0.5))
                        return jnp.sum(jnp.sin(y)), y

                    (_, y), g = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, x)
                    return y, jax.tree.leaves(nnx.to_pure_dict(g[0])), g[1]

                found.append(jax.tree.map(np.asarray, whole(jax.device_put(x, jax.NamedSharding(mesh, across)))))
        return found

    one, many = run((1, 1)), run((2, 2))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-9 * max(1, np.abs(a).max()))


def test_learned_activations_start_from_one_batch_of_the_full_precision_forward():
    policy = (
        "layers.0.attn.{q,k,v,o}: w=quest;a=lsq | layers.1.mlp.down: a=pact:range=symmetric | "
        "layers.*.attn.probs: a=bit:signed=false | head: a=bit"
    )
    model = fbi.model("nano", policy, **TINY)
    params = model.init(0)
    tokens = jax.random.randint(jax.random.key(1), (3, 16), 0, 64)
    filled = calibrate(model, params, tokens)
    assert sum(site.endswith("attn.probs") for site in learned_sites(model)) == 2

    plain = fbi.model("nano", **TINY)
    params = jax.tree.map(np.asarray, params)
    stacks = [params[f"layers_{i}_{i + 1}"] for i in range(2)]

    def strip(tree, like):
        return {k: strip(tree[k], like[k]) for k in like} if isinstance(like, dict) else tree

    like = plain.abstract()
    latent = {
        **{k: strip(params[k], like[k]) for k in ("embed", "norm", "head")},
        "layers_0_2": jax.tree.map(lambda *x: np.concatenate(x), *(strip(s, like["layers_0_2"]) for s in stacks)),
    }
    _, seen = plain.features(latent, tokens, wanted=["attn.q", "mlp.down", "head"])
    expected = 2 * np.abs(seen["attn.q"][0]).mean() / np.sqrt(7)
    np.testing.assert_allclose(filled["layers_0_1"]["attn"]["q"]["a"]["step"].ravel(), [expected], rtol=1e-5)
    expected = 3 * np.sqrt(np.square(seen["mlp.down"][1]).mean())
    np.testing.assert_allclose(filled["layers_1_2"]["mlp"]["down"]["a"]["alpha"].ravel(), [expected], rtol=1e-5)
    np.testing.assert_allclose(filled["head"]["a"]["alpha"].ravel(), [np.abs(seen["head"]).mean()], rtol=1e-5)
    probs = np.asarray(filled["layers_0_1"]["attn"]["probs"]["a"]["alpha"]).ravel()
    np.testing.assert_allclose(probs, 2 / 16, rtol=1e-5)  # rows of 16 probabilities sum to one
    assert calibrate(plain, plain.init(0), tokens).keys() == plain.init(0).keys()


def test_both_operands_rotated_alike_equal_both_rotated_back_in_the_model():
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 64)
    logits = {}
    for rotate in ("auto", "back"):
        model = fbi.model("nano", f"layers.*.mlp.*: w=quest:rotate={rotate};a=quest:rotate={rotate}", **TINY)
        logits[rotate] = model.apply(model.init(0), tokens)
    np.testing.assert_allclose(logits["auto"], logits["back"], rtol=1e-3, atol=1e-4)


def test_stochastic_rounding_draws_anew_for_each_key_site_and_layer():
    model = fbi.model("nano", "layers.*.mlp.*: w=absmax:bits=2,rounding=stochastic", **TINY)
    assert model.draws
    assert not fbi.model("nano", "fbi").draws
    params, tokens = model.init(0), jax.random.randint(jax.random.key(1), (2, 16), 0, 64)
    nearest = model.apply(params, tokens)
    first, second, again = (model.apply(params, tokens, None, Ctx(1.0, jax.random.key(k))) for k in (0, 1, 0))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, second)
    assert not np.allclose(first, nearest)


def test_boolean_attention_weighs_nothing_by_a_softmax():
    model = fbi.model("nano", "layers.*.attn.probs: a=bibert", **TINY)
    params, tokens = model.init(0), jax.random.randint(jax.random.key(1), (2, 16), 0, 64)
    changed = tokens.at[:, 8:].set(5)
    a, b = model.apply(params, tokens), model.apply(params, changed)
    np.testing.assert_allclose(a[:, :8], b[:, :8], rtol=1e-4, atol=1e-5)  # still causal
    assert not np.allclose(a, fbi.model("nano", **TINY).apply(params, tokens))
