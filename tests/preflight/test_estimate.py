"""The analytic model: counts by hand, agreement with the costs of the library, the order of layouts."""

import dataclasses

import pytest

from fbi.analysis.cost import cost
from fbi.errors import InputError
from fbi.model.config import PRESETS, count_parameters, preset
from fbi.policy import Policy
from fbi.preflight import model
from fbi.preflight.model import Layout, estimate, layouts, ranked
from fbi.preflight.report import wanted
from fbi.preflight.targets import parse
from fbi.train.run import Run


def run_of(name="fbi-7b", batch=1920, window=2048, **fields):
    run = Run(model=dataclasses.replace(preset(name), dtype="bfloat16"), **fields)
    return dataclasses.replace(run, data=dataclasses.replace(run.data, batch=batch, window=window))


@pytest.mark.parametrize("name", ["nano", "micro"])
def test_operations_are_those_of_the_library(name):
    run = run_of(name, 4, 64)
    forward, attention, taught = model.step_flops(run, PRESETS["nano"])
    assert forward == 2 * 4 * cost(run.model, Policy.parse("fp"), 64).macs
    products = [p for p in cost(run.model, Policy.parse("fp"), 64).products if p.site.startswith(("queries", "probs"))]
    assert attention == 2 * 4 * sum(p.macs for p in products)
    assert taught == 2 * 4 * cost(PRESETS["nano"], Policy.parse("fp"), 64).macs


def test_bytes_at_rest():
    run, target = run_of(), parse("v5e-64")
    total = count_parameters(run.model).total
    found = estimate(run, Layout(64, 1, 30), target, PRESETS["llama2-7b"])
    assert found.parameters == 4 * total / 64
    assert found.optimizer == 2 * found.parameters
    assert found.teacher == found.parameters


def test_what_links_carry():
    # FSDP over 8, one part, no teacher: of n = blocks + head, blocks twice and embedding and head once are gathered,
    # and every gradient is reduced and scattered in bfloat16.
    run = run_of("fbi-130m", 64)
    counts = count_parameters(run.model)
    found = estimate(run, Layout(8, 1), parse("v5e-8"))
    table = counts.embedding + counts.head
    assert found.sent_data == pytest.approx(7 / 8 * 2 * (2 * counts.linear + table + counts.linear + table))
    assert found.sent_model == 0
    # two parts: all of it twice
    assert estimate(run, Layout(8, 1, 2), parse("v5e-8")).sent_data == pytest.approx(2 * found.sent_data)


def test_tensor_parallelism_pays_in_links_and_saves_memory():
    run, target = run_of(batch=64), parse("v5e-64")
    wide, split = (estimate(run, Layout(d, m, 1), target) for d, m in ((64, 1), (16, 4)))
    assert split.sent_model > wide.sent_model == 0
    assert split.sent_data < wide.sent_data


def test_remat_trades_memory_for_operations():
    run, target = run_of(), parse("v5p-128")
    none, products, full = (estimate(run, Layout(64, 1, 10, remat), target) for remat in model.REMATS)
    assert none.memory > products.memory > full.memory
    assert none.flops < products.flops < full.flops
    forward = model.step_flops(run, None)[0]
    head = 2 * 1920 * 2048 * 32_000 * 4096
    assert full.flops * 64 == pytest.approx(4 * forward - head)


def test_a_stream_that_is_split_by_position_saves_memory_and_costs_no_more_on_the_links():
    run, target = run_of(batch=64), parse("v5e-64")
    for remat in model.REMATS:
        whole, split = (estimate(run, Layout(8, 8, 1, remat, sequence), target) for sequence in (False, True))
        tokens = 8 * 2048
        assert whole.memory - split.memory >= tokens * 32 * 2 * 4096 * 7 / 8  # bfloat16, every layer's input
        assert split.link_s == whole.link_s
    best = wanted(run, target, "data=8,model=8", 1, "full", sequence=True)[0][0]
    assert best.layout == Layout(8, 8, 1, "full", True)
    assert "--sequence True" in best.layout.flags()
    assert best.layout.execution().sequence
    odd = dataclasses.replace(run, data=dataclasses.replace(run.data, window=2044))
    with pytest.raises(InputError, match=r"sequence: the model axis of mesh='data=8,model=8' does not divide"):
        wanted(odd, target, "data=8,model=8", sequence=True)


def test_the_best_layout_fits_where_one_does():
    run, target = run_of(), parse("v5e-64")
    best = ranked(run, target)[0]
    assert best.layout.data * best.layout.model == 64
    assert best.memory <= 0.9 * target.chip.limit
    slower = [e for e in ranked(run, target) if e.memory <= 0.9 * target.chip.limit]
    assert best.step_s <= 1.06 * min(e.step_s for e in slower)


def test_layouts_divide_and_leave_chips_idle_only_where_none_divides():
    run = run_of("bitnet-3b", 1152)  # 3200 = 2^7 x 25: not over 256; 256 / 2 is
    found = layouts(run, parse("v6e-256"))
    assert {option.data * option.model for option in found} == {256}
    assert all(3200 % option.data == 0 and 1152 % (option.data * option.accumulate) == 0 for option in found)
    odd = layouts(run_of("fbi-130m", 3), parse("v5e-8"))
    assert {(o.data, o.model) for o in odd} == {(3, 2)}  # neither 6 nor 7 divides the heads and the vocabulary


def test_what_is_given_stays():
    run, target = run_of(), parse("v5e-64")
    assert wanted(run, target, "data=32,model=2", 60, "products")[0][0].layout == Layout(32, 2, 60, "products")
    assert {e.layout.accumulate for e in wanted(run, target, accumulate=30)[0]} == {30}
    with pytest.raises(InputError, match=r"data=60 does not divide model.dim=4096"):
        wanted(run, target, "data=60")
    with pytest.raises(InputError, match="'data=128' needs 128 devices, 64 are here"):
        wanted(run, target, "data=128")
    with pytest.raises(InputError, match=r"accumulate=7 does not divide data.batch=1920"):
        wanted(run, target, "data=64", 7)
    with pytest.raises(InputError, match="accumulate=7: no mesh of v5e-64 divides"):
        wanted(run, target, accumulate=7)
    with pytest.raises(InputError, match="accumulate=-1 must be at least 1"):
        wanted(run, target, accumulate=-1)


def test_flags_are_those_of_training():
    assert Layout(8, 2, 4, "products").flags() == (
        "--mesh data=8,model=2 --accumulate 4 --remat True --remat-keeps products --unroll 1"
    )
    execution = Layout(8, 2, 4, "none").execution(2)
    assert (execution.mesh, execution.accumulate, execution.remat) == ("data=8,model=2", 4, False)
