"""LTE as ordinary runs: dense, stage 1, stage 2; the record, a requested sparsity, resuming; what is refused."""

import dataclasses
import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_same, copy, params, rows, saved, tiny

import fbi
from fbi import optim
from fbi.analysis.routing import SIZES, WATCH, routing_rows, routing_sums, routing_tallies
from fbi.cli_tasks import evaluate
from fbi.errors import InputError
from fbi.loss import SCORES, Loss, Outputs
from fbi.model import Model
from fbi.model.axes import mesh_1x1
from fbi.model.config import PRESETS
from fbi.policy import Policy
from fbi.train import Execution
from fbi.train import mesh as meshes
from fbi.train.compose import check
from fbi.train.control import NO_CONTROL, Eta, bias_control, moved, sparsity_control
from fbi.train.load import build_model, load, starting_params
from fbi.train.step import begun, make_step

pytestmark = pytest.mark.slow

EXECUTION = Execution(mesh="data=1", log_every=3, eval_every=6, checkpoint_every=4, keep_every=1)
LOSS = "ce + 0.5*efficiency + 0.02*separability"
ROUTED = {"expert": 8}  # of 64 neurons
SPARSITY = 0.4


def stage1(corpus, **fields):
    return tiny(corpus, **{"policy": "bitnet-b158", "loss": LOSS, "steps": 12, "grouping": "contiguous",
                           "model": ROUTED, **fields})  # fmt: skip


@pytest.fixture(scope="module")
def stages(home, tmp_path_factory):
    """The directories of a dense run, of stage 1 with a requested sparsity, and of stage 2."""
    folder = tmp_path_factory.mktemp("stages")
    runs = {
        "dense": tiny(home.corpus, policy="bitnet-b158", steps=6),
        "first": stage1(home.corpus, start="../dense", sparsity=SPARSITY),
        "second": tiny(home.corpus, policy="bitnet-b158", steps=12, start="../first",
                       optimizer={"weight_decay": 0.1, "decay": "everything"},
                       model={**ROUTED, "routing": "hard"}),
        "steered": tiny(home.corpus, policy="bitnet-b158", steps=12, start="../first", sparsity=SPARSITY,
                        optimizer={"lr": 0.02}, model={**ROUTED, "routing": "hard"}),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FBI_CACHE", home.environment["FBI_CACHE"])
        for name, run in runs.items():
            fbi.train(run, folder / name, EXECUTION)
    return folder


@pytest.mark.parametrize("grouping", ["kmeans", "coactivation", "random"])
def test_grouped_neurons_make_the_same_model(stages, home, grouping):
    dense = load(stages / "dense")
    run = stage1(home.corpus, start=str(stages / "dense"), grouping=grouping, model={**ROUTED, "routing": "dense"})
    target = build_model(run)
    tokens = jax.random.randint(jax.random.key(0), (2, 16), 0, dense.model.config.vocab)
    with jax.set_mesh(mesh_1x1()):
        params = starting_params(run, target, lambda: tokens)
        given, there = (jax.device_get(tree["layers_0_1"]["mlp"]["up"]["w"]) for tree in (dense.params, params))
        assert not np.array_equal(given, there)
        np.testing.assert_array_equal(np.sort(given, axis=-1), np.sort(there, axis=-1))
        logits = [m.apply(p, tokens) for m, p in ((dense.model, dense.params), (target, params))]
    np.testing.assert_allclose(*logits, atol=1e-4)


def test_eval_says_what_share_is_skipped(stages, home, monkeypatch, capsys):
    monkeypatch.setenv("FBI_CACHE", home.environment["FBI_CACHE"])
    evaluate(stages / "second")
    header, values = [line for line in capsys.readouterr().out.splitlines() if "perplexity" in line or "valid" in line]
    assert header.rstrip(" |│┃").endswith("FFN sparsity")
    recorded = rows(stages / "second", "eval")[-1]["sparsity"]
    assert float(values.replace("│", " ").split()[-1]) == pytest.approx(recorded, abs=2e-4)


def test_the_record_tells_what_routers_do(stages):
    train = rows(stages / "first", "train")
    assert [row["step"] for row in train] == [3, 6, 9, 12]
    for row in train:
        assert 0 <= row["sparsity"] <= 1
        assert 0 <= row["near"] <= 1
        assert row["eta"] > 0
        expected = row["ce"] + row["eta"] * row["efficiency"] + 0.02 * row["separability"]
        assert row["loss"] == pytest.approx(expected, rel=2e-2)  # eta moves within the three steps of a row
    routing = rows(stages / "first", "routing")
    assert [(row["step"], row["site"]) for row in routing] == [
        (step, site) for step in (0, 6, 12) for site in ("layers.0.mlp.router", "all")
    ]
    for row in routing:
        unions = [row[f"union_{size}"] for size in SIZES]
        assert unions == sorted(unions, reverse=True)  # more tokens leave out fewer together
        assert unions[0] == pytest.approx(row["sparsity"])
    evaluated = rows(stages / "first", "eval")
    assert [row["sparsity"] for row in evaluated] == [row["sparsity"] for row in routing if row["site"] == "all"]
    # bitnet-b158 in print: log2(3) bits and a scale of 16 a matrix; routers of 33 x 8 numbers of 16 bits.
    attention, mlp = ((n * size * math.log2(3) + n * 16) for n, size in ((4, 32 * 32), (3, 32 * 64)))
    for row in evaluated:
        bits = attention + (1 - row["sparsity"]) * mlp + 16 * 33 * 8
        assert row["active_bits_per_weight"] == pytest.approx(bits / (4 * 1024 + 3 * 2048), rel=1e-6)
    assert not any("sparsity" in row for row in rows(stages / "dense"))


def test_the_requested_sparsity_is_met_and_the_threshold_stays(stages):
    done = json.loads((stages / "first" / "done.json").read_text())
    assert done["sparsity"] == pytest.approx(SPARSITY, abs=0.01)
    (row,) = rows(stages / "first", "calibration")
    assert row["requested"] == SPARSITY
    assert row["sparsity"] != SPARSITY  # before the shift
    model, weights, _ = load(stages / "first")
    assert model.config.routing == "soft"
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(weights))
    assert "control" in {path.name for path in (stages / "first" / "checkpoints" / "12").iterdir()}
    assert "control" not in {path.name for path in (stages / "second" / "checkpoints" / "12").iterdir()}


def test_stage_2_leaves_routers_alone_bit_for_bit_and_starts_from_stage_1(stages):
    before, after = params(stages / "first"), params(stages / "second")
    routers = [name for name in before if "router" in name]
    assert len(routers) == 2
    for name, leaf in after.items():
        assert (leaf.tobytes() == before[name].tobytes()) == (name in routers), name
    first, second = (rows(stages / name, "eval") for name in ("first", "second"))
    assert [row["step"] for row in second] == [0, 6, 12]
    assert second[0]["sparsity"] == first[-1]["sparsity"]  # the same routers on the same inputs
    assert second[0]["loss"] != first[-1]["loss"]  # scores against ones
    assert second[-1]["loss"] < second[0]["loss"]
    assert rows(stages / "first", "eval")[0]["step"] == 0


def test_stage_2_keeps_a_requested_sparsity_by_one_amount_on_all_biases(stages):
    before, after = params(stages / "first"), params(stages / "steered")
    (bias,) = [name for name in before if "router" in name and "bias" in name]
    (weight,) = [name for name in before if "router" in name and name != bias]
    assert after[weight].tobytes() == before[weight].tobytes()
    amounts = before[bias] - after[bias]
    assert abs(amounts.mean()) > 1e-3
    np.testing.assert_allclose(amounts, amounts.mean(), atol=1e-5)
    drift = [abs(row["sparsity"] - SPARSITY) for row in rows(stages / "steered", "calibration")]
    assert drift[0] > 0.0005  # of its inputs, which the shift at the end made good
    done = json.loads((stages / "steered" / "done.json").read_text())
    assert done["sparsity"] == pytest.approx(SPARSITY, abs=0.01)


@pytest.mark.parametrize("step", [8, 12])
def test_a_resumed_controller_has_the_same_numbers(step, stages, monkeypatch, home, tmp_path):
    monkeypatch.setenv("FBI_CACHE", home.environment["FBI_CACHE"])
    copy(stages / "dense", tmp_path / "dense")
    directory = copy(stages / "first", tmp_path / "first")
    (directory / "done.json").unlink()
    for later in saved(directory):
        if later > step:
            shutil.rmtree(directory / "checkpoints" / str(later))
    fbi.train(stage1(home.corpus, start="../dense", sparsity=SPARSITY), directory, EXECUTION)
    assert_same(directory, stages / "first")


# Blocks of an expert: wider ones would leak.
QUEST = "layers.*.{attn.q,attn.k,attn.v,attn.o,mlp.*}: w=quest:bits=4,block=32;a=quest:bits=4,block=32"


@pytest.mark.parametrize("policy", ["fp", "fbi", "bitnet-b158", QUEST], ids=["fp", "fbi", "b158", "quest"])
def test_both_stages_train_under_each_policy(policy):
    config = dataclasses.replace(PRESETS["nano"], expert=32, vocab=64, context=32)
    tokens = np.random.default_rng(0).integers(0, 64, (4, 17)).astype(np.int32)
    tx = optim.build(optim.OptimizerConfig(warmup=0.0, lr=0.005), 10)
    policy = Policy.parse(policy)
    with jax.set_mesh(mesh_1x1()):
        weights, batch = Model(config, policy).init(0), meshes.put_batch(tokens, jax.sharding.get_mesh())
        name = next(name for name in weights if name.startswith("layers_"))
        weights[name]["mlp"]["router"]["bias"] *= 0.0  # half of the experts, that there is something to skip
        for routing, loss, control in (("soft", LOSS, sparsity_control(0.5, 0.5)), ("hard", "ce", NO_CONTROL)):
            model = Model(dataclasses.replace(config, routing=routing), policy)
            step, found = make_step(model, Loss.parse(loss), tx, watch=WATCH, control=control), []
            before, state = jax.device_get(weights[name]["mlp"]), begun(weights, tx, control)
            for _ in range(3):
                state, sums = step(state, None, batch, jnp.float32(0))
                found.append(float(sums["ce"]))
            assert found[-1] < found[0], routing
            assert all(math.isfinite(float(value)) for value in sums.values())
            weights = state["params"]
            after = weights[name]["mlp"]
            assert not np.array_equal(before["down"]["w"], after["down"]["w"])
            assert after["router"].keys() == {"weight", "bias"}  # nothing of a quantizer's
            for leaf, now in after["router"].items():
                assert now.dtype == jnp.float32
                assert np.array_equal(before["router"][leaf], now) == (routing == "hard")
        wanted = ("mlp.router", "mlp.down")
        _, seen = jax.jit(functools.partial(model.features, wanted=wanted))(weights, batch[:, :-1])
    scores, hidden = seen["mlp.router"], seen["mlp.down"].reshape(2, 4, 16, 8, 32)
    np.testing.assert_array_equal(np.asarray(scores > 0.5), np.asarray(jnp.any(hidden != 0, -1)))
    assert 0.1 < float(jnp.mean(scores > 0.5)) < 0.9


def test_the_controller_by_hand():
    eta = Eta(jnp.log(jnp.float32(0.5)), jnp.float32(0.0), jnp.int32(0))
    eta = moved(eta, jnp.float32(0.4), 0.5, 0.5)
    assert float(eta.mean) == pytest.approx(0.4)  # the first batch alone
    assert float(jnp.exp(eta.log_eta)) == pytest.approx(0.5 * math.exp(0.05 * 0.1))
    eta = moved(eta, jnp.float32(1.0), 0.5, 0.5)
    assert float(eta.mean) == pytest.approx(0.46)
    for _ in range(50):
        eta = moved(eta, jnp.float32(1.0), 0.5, 0.5)
    before = float(eta.log_eta)
    assert float(moved(eta, jnp.float32(1.0), 0.5, 0.5).log_eta) == pytest.approx(before - 0.02)  # the bounded rate
    for _ in range(400):
        eta = moved(eta, jnp.float32(1.0), 0.5, 0.5)
    assert float(jnp.exp(eta.log_eta)) == pytest.approx(0.5 / 100, rel=1e-5)


def test_tallies_by_hand():
    # One layer, two sequences of two positions, two experts; + is on. Expert 0: ++ / -+; expert 1: -- / -+.
    scores = jnp.array([[[[0.9, 0.1], [0.9, 0.45]], [[0.5, 0.2], [0.7, 0.55]]]])
    for counted, expected in (
        ([[True, True], [True, True]], {"sparsity": 4 / 8, "near": 3 / 8, "union_1": 4 / 8, "union_2": 1 / 4,
                                        "union_4": 0.0, "union_8": None, "union_16": None}),
        ([[True, True], [True, False]], {"sparsity": 4 / 6, "near": 2 / 6, "union_1": 4 / 6, "union_2": 1 / 2,
                                         "union_4": None}),
    ):  # fmt: skip
        with jax.set_mesh(mesh_1x1()):
            tallies = routing_tallies({"mlp.router": scores}, jnp.array(counted))
        layer, whole = routing_rows(jax.device_get(tallies), 7)
        assert (layer["site"], whole["site"]) == ("layers.0.mlp.router", "all")
        assert (layer["step"], layer["kind"]) == (7, "routing")
        for row in (layer, whole):
            for name, value in expected.items():
                assert row[name] == (value if value is None else pytest.approx(value)), name


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"sparsity": 1.0, "model": ROUTED, "loss": LOSS}, "sparsity=1.0 must be above 0 and below 1"),
        ({"sparsity": 0.5}, "sparsity=0.5 needs routers, and model.expert=0, routing=soft uses none"),
        ({"sparsity": 0.5, "model": ROUTED, "loss": "ce + separability"}, "has not one such term of positive weight"),
        ({"sparsity": 0.5, "model": ROUTED, "loss": "ce + 0*efficiency"}, "has not one such term of positive weight"),
        ({"loss": LOSS}, "efficiency, separability trains routers, which model.expert=0, routing=soft does not"),
        ({"loss": LOSS, "start": "x", "model": {**ROUTED, "routing": "hard"}}, "model.expert=8, routing=hard does not"),
        ({"model": {**ROUTED, "routing": "hard"}}, "start='' has none that were trained; set start to a run with"),
        (
            {"grouping": "random"},
            r"grouping=random makes experts of .* there is none here \(model.expert=0, start=''\)",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(fields, says, home):
    with pytest.raises(InputError, match=says):
        check(tiny(home.corpus, **fields), Execution(mesh="data=1"))


def test_starts_and_meshes_that_do_not_fit_are_refused(stages, home, monkeypatch, tmp_path):
    monkeypatch.setenv("FBI_CACHE", home.environment["FBI_CACHE"])
    hard = tiny(home.corpus, start=str(stages / "dense"), model={**ROUTED, "routing": "hard"})
    with pytest.raises(InputError, match=r"to start from have none; train them first in a run with model.routing=soft"):
        fbi.train(hard, tmp_path / "hard", EXECUTION)
    split = tiny(home.corpus, model={"expert": 32, "heads": 4, "kv_heads": 4, "head_dim": 8})
    with pytest.raises(InputError, match=r"model=4 does not divide .*model.ff / model.expert=2"):
        check(split, Execution(mesh="model=4"))


@pytest.mark.parametrize("spread", [0.02, 0.2, 1.0])
def test_biases_come_to_a_requested_sparsity_however_alike_the_logits_are(spread):
    logits, amount, shares = spread * jax.random.normal(jax.random.key(0), (2, 1, 16, 64)) + 1.2 * spread, 0.0, []
    control = bias_control(0.5)
    for _ in range(12):
        sums = routing_sums(Outputs(None, jnp.zeros((1, 16), int), features={SCORES: jax.nn.sigmoid(logits - amount)}))
        shares.append(float(sums["sparsity"]) / 16)
        params = {"router": {"bias": jnp.zeros(2)}}
        kept, _ = control.update({"params": params}, sums, jnp.float32(16))
        amount -= float(kept["params"]["router"]["bias"][0])
    assert shares[0] < 0.2
    assert shares[-4:] == pytest.approx([0.5] * 4, abs=0.02)
