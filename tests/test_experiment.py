"""Runs as values: single fields replaced, text and back, what differs, what a smoke test keeps."""

import dataclasses
import json

import pytest

from fbi.data import DataConfig
from fbi.errors import InputError
from fbi.experiment import grid, ladder, overlay, seeds, smoke, variants, zipped
from fbi.model.config import PRESETS, ModelConfig, check, count_parameters
from fbi.optim import OptimizerConfig
from fbi.train import Execution, Run
from fbi.train.compose import check as check_run
from fbi.train.run import FORMAT, GuardConfig, differences, from_json, to_json
from fbi.train.rundir import parse_config

OTHER = Run(
    name="other",
    model=dataclasses.replace(PRESETS["micro"], norm="sub", tied=True, dtype="bfloat16"),
    policy="layers.{0,-1}.*: w=none | layers.*: w=bitnet-b158;a=absmax:bits=8",
    loss="0.5*ce + 0.5*ad:temperature=2",
    teacher="runs/teacher",
    start="runs/start",
    data=DataConfig("text:books", field="body", tokenizer="bpe:512", window=64, mask_documents=True),
    optimizer=OptimizerConfig(lr=1e-3, schedule="two-stage", decay="everything"),
    guard=GuardConfig(spike=1.5, retries=0),
    steps=7,
    seed=3,
)


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("steps=12", "steps", 12),
        (" steps = 12 ", "steps", 12),
        ("name=a=b", "name", "a=b"),
        ("policy=layers.*: w=fbi", "policy", "layers.*: w=fbi"),
        ("teacher=", "teacher", ""),
        ("data.window=64", "data.window", 64),
        ("data.mask_documents=true", "data.mask_documents", True),
        ("data.mask_documents=False", "data.mask_documents", False),
        ("optimizer.lr=1e-4", "optimizer.lr", 1e-4),
        ("optimizer.lr=1", "optimizer.lr", 1.0),
        ("optimizer.schedule=wsd", "optimizer.schedule", "wsd"),
        ("model=micro", "model", PRESETS["micro"]),
        ("model.tied=true", "model.tied", True),
        ("guard.retries=0", "guard.retries", 0),
    ],
)
def test_an_assignment_replaces_one_field(assignment, path, value):
    run = overlay(Run(), [assignment])
    found = run
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)
    changed = [difference.partition(":")[0] for difference in differences(to_json(Run()), to_json(run))]
    assert all(field == path or field.startswith(f"{path}.") for field in changed)


def test_assignments_are_made_in_order():
    run = overlay(Run(), ["model.layers=5", "model=micro", "model.ff=256", "steps=1", "steps=2"])
    assert run.model == dataclasses.replace(PRESETS["micro"], ff=256)
    assert run.steps == 2
    assert overlay(OTHER, []) == OTHER


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("steps", "'steps' is not FIELD=VALUE, as in --set data.batch=8"),
        (
            "step=3",
            r"unknown field 'step' \(did you mean 'steps'\?\); valid: data, final_windows, grouping, guard, loss",
        ),
        ("data.windows=3", r"did you mean 'data.window'\?\); valid: data.batch, data.corpus, data.field"),
        ("datas.window=3", r"unknown field 'datas.window'.*valid: data, final_windows, grouping, guard"),
        ("optimizer.x.y=3", "unknown field 'optimizer.x.y'.*valid: optimizer.b1"),
        ("steps.x=3", "steps is a single value, it has no field x"),
        ("data=3", "--set data: give one of its fields: data.corpus, data.field"),
        ("model=nan0", r"unknown model 'nan0' \(did you mean 'nano'\?\)"),
        ("steps=1.5", "steps='1.5' is not a whole number"),
        ("steps=", "steps='' is not a whole number"),
        ("steps=true", "steps='true' is not a whole number"),
        ("optimizer.lr=fast", "optimizer.lr='fast' is not a number"),
        ("optimizer.lr=nan", "optimizer.lr=nan is not a finite number"),
        ("optimizer.lr=1e999", "optimizer.lr=inf is not a finite number"),
        ("model.tied=yes", "model.tied='yes' is not true or false"),
        ("model.norm=post", "unknown model.norm 'post'; valid: inner, pre, sub"),
        ("=3", "unknown field ''"),
    ],
)
def test_an_assignment_that_cannot_be_is_refused(assignment, says):
    with pytest.raises(InputError, match=says):
        overlay(Run(), [assignment])


@pytest.mark.parametrize("run", [Run(), OTHER], ids=["default", "other"])
def test_a_run_and_its_json_are_the_same(run):
    text = json.dumps({"format": FORMAT, "run": to_json(run)})
    again = parse_config(json.loads(text), "config.json")
    assert again == run
    assert again.hash == run.hash
    assert differences(to_json(run), to_json(again)) == []


def test_json_may_leave_out_what_is_default_and_name_a_preset():
    assert from_json(Run, {}) == Run()
    run = from_json(Run, {"model": "micro", "data": {"window": 32}, "optimizer": {"lr": 1}})
    assert run == Run(model=PRESETS["micro"], data=DataConfig(window=32), optimizer=OptimizerConfig(lr=1.0))
    assert isinstance(run.optimizer.lr, float)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "the config must be an object"),
        ({"data": 3}, "data must be an object with fields, not 3"),
        ({"stepz": 3}, r"unknown field 'stepz' \(did you mean 'steps'\?\)"),
        ({"data": {"batches": 3}}, r"unknown field 'data.batches' \(did you mean 'data.batch'\?\)"),
        ({"steps": "3"}, "steps='3' is not a whole number"),
        ({"steps": True}, "steps=True is not a whole number"),
        ({"steps": 3.0}, "steps=3.0 is not a whole number"),
        ({"policy": None}, "policy=None is not text"),
        ({"optimizer": {"lr": False}}, "optimizer.lr=False is not a number"),
        ({"optimizer": {"lr": float("inf")}}, "optimizer.lr=inf is not a finite number"),
        ({"model": {"tied": 1}}, "model.tied=1 is not true or false"),
        ({"model": {"norm": ["pre"]}}, "unknown model.norm"),
        ({"model": "giant"}, "unknown model 'giant'; valid: bitnet-1.3b"),
    ],
)
def test_json_of_another_shape_is_refused(data, says):
    with pytest.raises(InputError, match=says):
        from_json(Run, data)


def test_every_field_changes_the_hash():
    hashes = {Run().hash, OTHER.hash}
    for assignment in ("name=x", "model.ff=128", "policy=fp", "loss=mix", "data.seed=1", "optimizer.b1=0.8",
                       "guard.spike=3", "steps=501", "seed=1", "teacher=t", "start=s"):  # fmt: skip
        hashes.add(overlay(Run(), [assignment]).hash)
    assert len(hashes) == 13
    assert Run().hash == Run().hash


def test_differences_name_the_fields():
    changed = overlay(Run(), ["data.batch=8", "policy=fp", "model.ff=128"])
    assert differences(to_json(Run()), to_json(changed)) == [
        f"model.ff: {Run().model.ff} -> 128",
        "policy: 'fbi' -> 'fp'",
        "data.batch: 32 -> 8",
    ]
    assert differences({"a": 1}, {"b": 1}) == ["a: 1 -> None", "b: None -> 1"]
    assert differences({"a": {"b": 1}}, {"a": {"b": 1}}) == []


@pytest.mark.parametrize("name", PRESETS)
def test_a_smoke_run_is_small_and_keeps_what_the_run_is_about(name):
    run = dataclasses.replace(OTHER, model=PRESETS[name], loss="ce", teacher="", policy="fbi", start="")
    small = smoke(run)
    assert small.name == "other-smoke"
    assert (small.steps, small.model.layers, small.model.dim, small.data.window) == (2, 2, 128, 64)
    assert small.model.vocab == 512
    assert small.data.tokenizer == "bpe:512"
    kept = ("policy", "loss", "optimizer", "guard", "seed", "start", "teacher")
    assert [getattr(small, field) for field in kept] == [getattr(run, field) for field in kept]
    for field in ("norm", "activation", "tied", "residual_init", "rope_base", "dtype"):
        assert getattr(small.model, field) == getattr(run.model, field)
    assert small.data.corpus == run.data.corpus
    assert small.data.mask_documents
    check(small.model)
    check_run(small, Execution(mesh="data=1"))


def test_shapes_that_cannot_be_built_are_refused():
    for changes, says in [
        ({"kv_heads": 3}, r"model.kv_heads=3 does not divide heads=4; use one of \[1, 2, 4\]"),
        ({"head_dim": 3}, "model.head_dim=3 is odd"),
        ({"layers": 0}, "model.layers=0 must be at least 1"),
    ]:
        with pytest.raises(InputError, match=says):
            check(dataclasses.replace(ModelConfig(), **changes))


BASE = Run(name="w", steps=3)


def test_a_grid_has_every_combination_in_order_and_names_them():
    runs = grid(BASE, {"policy": ["fp", "fbi"], "optimizer.lr": {"low": 1e-3, "high": 3e-3}, "steps": [5]})
    assert [run.name for run in runs] == ["w-fp-low", "w-fp-high", "w-fbi-low", "w-fbi-high"]
    assert [(run.policy, run.optimizer.lr, run.steps) for run in runs] == [
        ("fp", 1e-3, 5), ("fp", 3e-3, 5), ("fbi", 1e-3, 5), ("fbi", 3e-3, 5)]  # fmt: skip
    assert [run.name for run in grid(Run(), {"policy": ["layers.*: w=quest:bits=2", "fp"]})] == [
        "layers.-w-quest-bits-2", "fp"]  # fmt: skip
    assert grid([], {"steps": [1]}) == []


def test_zipped_fields_go_together():
    runs = zipped([BASE, Run(name="x")], {"model": ["nano", "micro"], "optimizer.lr": [1e-3, 5e-4]})
    rates = {"nano": 1e-3, "micro": 5e-4}
    wanted = [(f"{name}-{size}", PRESETS[size], lr) for name in "wx" for size, lr in rates.items()]
    assert [(r.name, r.model, r.optimizer.lr) for r in runs] == wanted
    with pytest.raises(InputError, match=r"equally many values each, not \{'steps': 1, 'seed': 2\}"):
        zipped(BASE, {"steps": [1], "seed": [1, 2]})


def test_seeds_change_start_and_data_order_and_pair_students_with_teachers():
    runs = seeds(variants(Run(), {"fp": {}, "ad": {"loss": "ad", "teacher": "@fp-s{seed}"}}), 2)
    assert [(r.name, r.seed, r.data.seed, r.teacher) for r in runs] == [
        ("fp-s0", 0, 0, ""), ("fp-s1", 1, 1, ""), ("ad-s0", 0, 0, "@fp-s0"), ("ad-s1", 1, 1, "@fp-s1")]  # fmt: skip
    assert [r.seed for r in seeds(BASE, [7, 3])] == [7, 3]
    later = seeds(variants(Run(), {"first": {}, "second": {"data.seed": 2}}), 2)
    assert [r.data.seed for r in later] == [0, 1, 2000, 2001]


def test_a_ladder_trains_every_size_on_as_many_tokens_per_parameter():
    runs = ladder(BASE, {"small": PRESETS["nano"], "large": PRESETS["micro"]}, 2.0)
    tokens = BASE.data.batch * BASE.data.window
    for run, name in zip(runs, ("nano", "micro"), strict=True):
        wanted = 2.0 * count_parameters(PRESETS[name]).non_embedding
        assert 0 <= run.steps * tokens - wanted < tokens
    assert [run.name for run in runs] == ["w-small", "w-large"]
    with pytest.raises(InputError, match="it must be above 0"):
        ladder(BASE, {"small": PRESETS["nano"]}, 0.0)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"optimizer.rate": 1}, "unknown field 'optimizer.rate'"),
        ({"steps": "3"}, "steps='3' is not a whole number"),
        ({"model": "nan0"}, "did you mean 'nano'"),
        ({"data": {"window": 3, "x": 1}}, "unknown field 'data.x'"),
    ],
)
def test_a_combinator_refuses_unknown_fields_and_wrong_types(fields, says):
    with pytest.raises(InputError, match=says):
        grid(BASE, {name: [value] for name, value in fields.items()})
