"""Routers beside LTE's: which experts each uses, what trains it, on every mesh; what cannot be is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbi.errors import InputError
from fbi.loss import Loss, Outputs
from fbi.model import Model
from fbi.model.axes import mesh_1x1
from fbi.model.config import check, count_parameters
from fbi.model.convert import adapt, check_routers
from fbi.model.router import magnitude
from fbi.model.routing import ROUTING, choice
from fbi.quant import Ctx

KINDS = {  # routing and loss that each is for
    "linear": ("soft", "ce"),
    "low-rank": ("dense", "prediction"),
    "noisy": ("softmax", "ce"),
    "random": ("hard", "ce"),
    "oracle": ("hard", "ce"),
}
TOP = 2  # of 6 experts of 8 neurons


def of_kind(tiny, kind, **changes):
    routing = changes.pop("routing", KINDS[kind][0])
    return Model(tiny(layers=1, expert=8, router=kind, routing=routing, **({"top_k": TOP} | changes)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_uses_the_k_best_and_gradients_reach_what_is_trained(kind, tiny, tokens, drawn):
    model, loss = of_kind(tiny, kind), Loss.parse(KINDS[kind][1])
    wanted = ("mlp.router", "mlp.router.logits", *loss.features)
    assert Model(model.config).parameter_count() == count_parameters(model.config).total

    def value(params):
        logits, found = model.features(params, tokens, wanted=wanted)
        return loss(Outputs(logits, tokens, features=found))[0], found

    gradient, found = jax.jit(jax.grad(value, has_aux=True))(drawn(model))
    scores, logits = (np.asarray(found[name]) for name in ("mlp.router", "mlp.router.logits"))
    np.testing.assert_array_equal((scores > 0.5).sum(-1), TOP)
    best = np.argsort(-logits, -1)[..., :TOP]
    assert (np.take_along_axis(scores, best, -1) > 0.5).all()
    mlp = gradient["layers_0_1"]["mlp"]
    moved = {name for name, leaf in mlp.get("router", {}).items() if np.any(leaf)}
    assert (
        moved
        == {
            "linear": {"weight", "bias"},
            "low-rank": {"thin", "weight", "bias"},
            "noisy": {"weight", "bias"},  # without a key there is no noise
            "random": set(),
            "oracle": set(),
        }[kind]
    )
    # A predictor trains beside the model, and all others in it.
    assert np.any(mlp["up"]["w"]) == (kind != "low-rank")
    assert np.any(gradient["embed"]) == (kind != "low-rank")


def test_a_top_k_and_its_softmax_by_hand():
    logits = jnp.array([[[1.0, 4.0, 2.0, -3.0], [0.0, 0.0, 0.0, 0.0]]])
    with jax.set_mesh(mesh_1x1()):
        shifted = choice(2)(logits)
        gates, chosen = ROUTING["softmax"].shares(shifted, jax.nn.sigmoid(shifted))
    np.testing.assert_allclose(shifted[0, 0], [-0.5, 2.5, 0.5, -4.5])  # half way between 2 and 1
    e = np.exp([4.0, 2.0])
    np.testing.assert_allclose(gates[0], [[0, e[0] / e.sum(), e[1] / e.sum(), 0], [0, 0, 0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(chosen[0], [[0, 1, 1, 0], [0, 0, 0, 0]])  # of equals none
    assert choice(0)(logits) is logits


def test_noise_is_there_in_training_alone_and_is_that_of_the_key(tiny, tokens, drawn):
    model = of_kind(tiny, "noisy")
    params = drawn(model)
    assert model.draws
    assert not Model(dataclasses.replace(model.config, routing="hard")).draws
    assert not of_kind(tiny, "linear").draws

    def logits(key):
        found = model.features(params, tokens, ctx=Ctx(0.5, key), wanted=["mlp.router.logits"])[1]
        return np.asarray(found["mlp.router.logits"])

    first, again, other, none = (logits(k) for k in (jax.random.key(0), jax.random.key(0), jax.random.key(1), None))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    x = np.asarray(model.features(params, tokens, wanted=["mlp.up"])[1]["mlp.up"])
    noise = jax.tree.map(np.asarray, params["layers_0_1"]["mlp"]["router"]["noise"])[0]
    normal = (first - none) / np.log1p(np.exp(x @ noise))
    assert abs(normal.mean()) < 0.25
    assert 0.8 < normal.std() < 1.2


def test_the_oracle_ranks_experts_by_the_magnitudes_of_their_neurons(tiny, tokens, drawn):
    model = of_kind(tiny, "oracle")
    dense = Model(dataclasses.replace(model.config, router="linear", routing="dense", top_k=0))
    params = drawn(dense)
    bare = adapt(params, dense, model)
    assert "router" not in bare["layers_0_1"]["mlp"]
    hidden = np.asarray(dense.features(params, tokens, wanted=["mlp.down"])[1]["mlp.down"])
    sums = np.abs(hidden).reshape(*hidden.shape[:-1], 6, 8).sum(-1)
    found = model.features(bare, tokens, wanted=["mlp.router", "mlp.router.logits"])[1]
    np.testing.assert_allclose(found["mlp.router.logits"], np.log(sums), rtol=1e-4, atol=1e-5)
    best = np.argsort(-sums, -1)[..., :TOP]
    assert (np.take_along_axis(np.asarray(found["mlp.router"]), best, -1) > 0.5).all()


def test_a_prediction_is_the_cross_entropy_with_the_experts_that_matter_by_hand():
    hidden = jnp.array([3.0, -1, 0, 0.5, 2, 2])[None, None, None]  # of experts of two neurons: 4, 0.5, 4
    logits = jnp.array([2.0, -1, 0])[None, None, None]
    features = {"mlp.down": hidden, "mlp.router.logits": logits}
    out = Outputs(jnp.zeros((1, 1, 4)), jnp.zeros((1, 1), int), features=features)
    np.testing.assert_array_equal(magnitude(hidden, 3)[0, 0, 0], [4, 0.5, 4])
    each = [np.log1p(np.exp(-2.0)), np.log1p(np.exp(-1.0)), np.log(2)]  # labels 1, 0, 1
    total = Loss.parse("prediction:sparsity=0.4")(out)[1]["prediction"]
    assert float(total) == pytest.approx(np.mean(each), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["low-rank", "noisy", "oracle"])
def test_a_mesh_changes_nothing(kind, tiny, tokens, drawn, x64):
    batch, found = np.tile(np.asarray(tokens), (2, 1)), []
    loss = Loss.parse(KINDS[kind][1])
    for shape in ((1, 1), (2, 2)):
        mesh = jax.make_mesh(shape, ("data", "model"), devices=jax.devices()[: shape[0] * shape[1]])
        model = of_kind(tiny, kind, dtype="float64")
        with jax.set_mesh(mesh):
            rows = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data", None)))

            def value(p, rows=rows, model=model):
                logits, features = model.features(p, rows, ctx=Ctx(0.5, jax.random.key(0)), wanted=loss.features)
                return loss(Outputs(logits, rows, features=features))[0]

            found.append(jax.device_get(jax.jit(jax.value_and_grad(value))(drawn(model))))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-9)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-8), found[1][1], found[0][1])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"expert": 0, "router": "noisy"},
            "model.router=noisy needs experts, and model.expert=0 has none; set model.e",
        ),
        ({"expert": 0, "top_k": 3}, "model.top_k=3 needs experts, and model.expert=0 has none"),
        ({"top_k": 6}, "model.top_k=6 must be at least 0 and below the 6 experts"),
        ({"router": "random"}, "model.router=random is never trained, and model.routing=soft is for training; use"),
        (
            {"router": "oracle", "routing": "hard"},
            "model.router=oracle ranks experts and has no threshold; set model.to",
        ),
        ({"routing": "softmax"}, "model.routing=softmax ranks experts and has no threshold; set model.top_k"),
    ],
)
def test_routers_that_cannot_be_are_refused(changes, says, tiny):
    with pytest.raises(InputError, match=says):
        check(tiny(**{"expert": 8, **changes}))


def test_routers_start_from_those_of_their_kind_or_from_none(tiny):
    linear, thin = tiny(expert=8), tiny(expert=8, router="low-rank", routing="hard")
    with pytest.raises(
        InputError, match=r"of the kind linear to low-rank; use model.router=linear, or start from the d"
    ):
        check_routers(linear, thin)
    with pytest.raises(InputError, match=r"model.routing=hard freezes the routers, .* have none"):
        check_routers(tiny(), thin)
    for kind in ("random", "oracle"):
        check_routers(tiny(), tiny(expert=8, router=kind, routing="hard", top_k=2))
    check_routers(linear, tiny(expert=8, router="oracle", routing="hard", top_k=2))
