"""What LTE is compared with, as ordinary runs: pruned weights stay away, a predictor trains beside its model."""

import json

import jax
import numpy as np
import pytest
from support import params, rows, tiny

import fbi
from fbi import optim
from fbi.errors import InputError
from fbi.train import Execution
from fbi.train.compose import check

EXECUTION = Execution(mesh="data=1", log_every=6, eval_every=20, checkpoint_every=20)
ROUTED = {"expert": 8}  # of 64 neurons
PREDICTOR = {**ROUTED, "router": "low-rank", "routing": "dense"}
KEEP = {"freeze": "zeros", "weight_decay": 0.1}


@pytest.fixture(scope="module")
def trained(home, tmp_path_factory):
    """The directories of a dense run, of one that is pruned, of a predictor, and of the model that it chooses for."""
    folder = tmp_path_factory.mktemp("baselines")
    runs = {
        "dense": tiny(home.corpus, policy="fp", steps=12),
        "pruned": tiny(home.corpus, policy="fp", steps=6, start="../dense", optimizer=KEEP,
                       pruning="wanda:sparsity=0.5,pattern=expert,expert=8"),
        "predictor": tiny(home.corpus, policy="fp", steps=18, start="../dense", loss="prediction",
                          optimizer={"weight_decay": 0.0, "lr": 0.03}, model=PREDICTOR),
        "chosen": tiny(home.corpus, policy="fp", steps=6, start="../predictor",
                       model={**PREDICTOR, "routing": "hard", "top_k": 4}),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FBI_CACHE", home.environment["FBI_CACHE"])
        for name, run in runs.items():
            fbi.train(run, folder / name, EXECUTION)
    return folder


def matrices(directory):
    return {name: leaf for name, leaf in params(directory).items() if "['mlp']" in name and name.endswith("['w']")}


@pytest.mark.slow
def test_pruned_experts_stay_away_while_the_rest_trains(trained):
    first, last = rows(trained / "pruned", "eval")
    assert (first["step"], last["step"]) == (0, 6)
    assert first["sparsity"] == last["sparsity"] == pytest.approx(0.5)
    assert json.loads((trained / "pruned" / "done.json").read_text())["sparsity"] == pytest.approx(0.5)
    assert first["loss"] > rows(trained / "dense", "eval")[-1]["loss"]
    assert last["loss"] < first["loss"]
    for name, leaf in matrices(trained / "pruned").items():
        assert (leaf == 0).mean() == pytest.approx(0.5), name


@pytest.mark.slow
def test_a_predictor_learns_beside_a_model_that_stays(trained):
    before, after = params(trained / "dense"), params(trained / "predictor")
    routers = set(after) - set(before)
    assert len(routers) == 3
    moved = [name for name in before if not np.array_equal(np.sort(before[name], None), np.sort(after[name], None))]
    assert moved == []  # its neurons are grouped, its weights are the same
    told = rows(trained / "predictor", "train")
    assert told[-1]["prediction"] < told[0]["prediction"]
    first, last = rows(trained / "predictor", "eval")
    assert last["loss"] == pytest.approx(first["loss"])
    chosen = rows(trained / "chosen", "eval")
    assert [row["sparsity"] for row in chosen] == [0.5, 0.5]
    assert chosen[0]["loss"] != pytest.approx(last["loss"])
    assert chosen[-1]["loss"] < chosen[0]["loss"]
    assert all(np.array_equal(params(trained / "chosen")[name], after[name]) for name in routers)


def test_zeros_are_frozen_and_leave_the_norm_of_the_gradient_to_the_others():
    config = optim.OptimizerConfig(warmup=0.0, freeze="zeros", lr=1.0)
    tree = lambda w: {"layers_0_1": {"mlp": {"up": {"w": jax.numpy.asarray(w)}}}, "embed": jax.numpy.zeros(1)}
    params, gradients = tree([1.0, 0.0, 1.0]), tree([0.6, 99.0, 0.8]) | {"embed": jax.numpy.ones(1)}
    tx = optim.build(config, 10)
    updates, state = tx.update(gradients, tx.init(params), params)
    # Adam's first step is sign(g); decay adds 0.1 w; times -lr. A zero of the embedding is no pruned weight.
    np.testing.assert_allclose(updates["layers_0_1"]["mlp"]["up"]["w"], [-1.1, 0.0, -1.1], rtol=1e-5)
    np.testing.assert_allclose(updates["embed"], [-1.0], rtol=1e-5)
    mean = state[2].mu["layers_0_1"]["mlp"]["up"]["w"]
    np.testing.assert_allclose(mean, 0.1 * np.array([0.6, 0, 0.8]) / 2**0.5, rtol=1e-5)  # of norm sqrt(2), clipped to 1


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"pruning": "wanda"}, "pruning='wanda' needs trained weights, and start='' has none; set start"),
        ({"pruning": "wanda", "start": "x"}, "with optimizer.freeze='' the first step brings pruned weights back"),
        ({"pruning": "wanda", "start": "x", "model": ROUTED}, "use model.expert=0, the experts of a pattern are named"),
        ({"pruning": "wanda:sparsity=1.5", "start": "x"}, "sparsity=1.5 must be above 0 and below 1"),
        (
            {"pruning": "wanda:pattern=expert,expert=7", "start": "x", "optimizer": KEEP},
            "expert=7 does not divide ff=64",
        ),
        (
            {"loss": "ce + prediction"},
            "prediction trains routers beside a model that uses all experts, not model.expert=0",
        ),
        (
            {"loss": "prediction", "model": ROUTED},
            "not model.expert=8, routing=soft; use model.expert=32 with model.rout",
        ),
        (
            {"sparsity": 0.5, "model": {**ROUTED, "top_k": 2}, "loss": "ce + 0.5*efficiency"},
            "model.top_k=2 fixes the sparsity at 0.75, and sparsity=0.5 asks for one; drop one of them",
        ),
        (
            {"model": {**ROUTED, "router": "random", "routing": "hard"}},
            "start='' has none that were trained; set start",
        ),
        (
            {"model": {"gated": False, "router": "oracle"}},
            "model.router=oracle needs experts, and model.expert=0 has none",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(fields, says, home):
    with pytest.raises(InputError, match=says):
        check(tiny(home.corpus, policy="fp", **fields), Execution(mesh="data=1"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "model", "says"),
    [
        (
            "dense",
            {**PREDICTOR, "routing": "hard", "top_k": 4},
            "the weights to start from have none; train them first",
        ),
        ("dense", {**ROUTED, "gated": False}, "cannot adapt weights to a model of another shape: gated True to False"),
        ("predictor", ROUTED, "cannot adapt routers of the kind low-rank to linear"),
    ],
)
def test_starts_that_do_not_fit_are_refused(start, model, says, trained, home, monkeypatch, tmp_path):
    monkeypatch.setenv("FBI_CACHE", home.environment["FBI_CACHE"])
    run = tiny(home.corpus, policy="fp", start=str(trained / start), model=model)
    with pytest.raises(InputError, match=says):
        fbi.train(run, tmp_path / "new", EXECUTION)
