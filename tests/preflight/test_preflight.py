"""The command: a small run compiled for emulated devices, what it says of it, and what it refuses."""

import dataclasses
import importlib.util
import json

import jax
import pytest

from fbi.analysis.chips import CHIPS
from fbi.cli import main
from fbi.errors import InputError
from fbi.model import Model
from fbi.model.config import ModelConfig
from fbi.policy import Policy
from fbi.preflight import book
from fbi.preflight.compile import TooLarge, compile_step, refusal
from fbi.preflight.model import Layout, estimate
from fbi.preflight.report import found as finding
from fbi.preflight.report import preflight, tables
from fbi.preflight.targets import devices, parse
from fbi.train import mesh as meshes
from fbi.train.run import Run, to_json

SHAPE = ModelConfig(vocab=512, dim=64, layers=3, heads=2, kv_heads=2, head_dim=32, ff=128, context=64)
RUN = dataclasses.replace(
    Run(name="small", model=SHAPE, steps=10), data=dataclasses.replace(Run().data, batch=16, window=32)
)


@pytest.fixture(scope="module")
def compiled():
    """The program of full remat over a mesh of 4 x 2."""
    return compile_step(RUN, Layout(4, 2, 1, "full"), parse("cpu:8"), "cpu")


@pytest.fixture
def config(tmp_path):
    """The run's config.json, with fields replaced."""

    def write(run=RUN):
        path = tmp_path / "run.json"
        path.write_text(json.dumps({"format": 1, "run": to_json(run)}))
        return str(path)

    return write


@pytest.fixture
def refused(config, capsys):
    """Asserts that the command ends with code 2 and one line that says all of the words."""

    def check(*says, run=RUN, arguments=()):
        assert main(["preflight", config(run), *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("fbi: error: ")
        assert err.count("\n") == 1
        assert all(words in err for words in says), err

    return check


def test_bytes_at_rest_are_those_of_the_real_state(compiled):
    total = sum(leaf.size for leaf in jax.tree.leaves(Model(SHAPE, Policy.parse("fbi")).abstract()))
    assert compiled.parameters == pytest.approx(4 * total / 8, rel=0.1)  # norms and embedding lie on fewer
    assert compiled.optimizer == pytest.approx(2 * compiled.parameters, rel=0.01)
    assert compiled.teacher == 0
    assert compiled.batch == 16 * 33 * 4 / 4
    assert compiled.temporaries > 0


def test_collectives_of_the_real_step(compiled):
    gathers = [c for c in compiled.collectives if c.kind == "all-gather" and c.loops]
    assert {c.times for c in gathers} == {3}  # a layer at a time
    assert not [c for c in compiled.collectives if c.hoistable]
    # Every matrix of a layer in float32, of which each half of the model axis has half, forwards and backwards.
    assert sum(c.bytes for c in gathers) == 2 * 4 * (4 * 64 * 64 + 3 * 64 * 128) / 2
    assert compiled.warnings == ()


def test_the_estimate_is_near_what_is_compiled(compiled):
    target = parse("cpu:8")
    full = estimate(RUN, Layout(4, 2, 1, "full"), target)
    assert 0.5 < full.memory / compiled.peak < 2
    none = compile_step(RUN, Layout(4, 2, 1, "none"), target, "cpu")
    assert none.temporaries > compiled.temporaries  # as the model ranks them
    assert estimate(RUN, Layout(4, 2, 1, "none"), target).memory > full.memory


def test_a_finding_adds_up(compiled):
    target = parse("cpu:8")
    best = estimate(RUN, Layout(4, 2, 1, "full"), target)
    said = finding(RUN, target, best, compiled, "cpu", 1)
    memory = said["memory"]
    parts = ("parameters", "optimizer", "teacher", "batch", "temporaries", "code")
    assert memory["peak"] == sum(memory[part] for part in parts)
    assert said["step_s"] == max(said["roofline_s"].values()) == said["roofline_s"][said["bound"]]
    assert said["tokens_per_s"] == pytest.approx(16 * 32 / said["step_s"])
    assert said["chip_hours"] == pytest.approx(8 * 10 * said["step_s"] / 3600)
    assert said["mfu_bound"] <= 1
    assert json.loads(json.dumps(said)) == said
    shown = "\n".join(table.terminal() for table in tables(said))
    assert "all-gather" in shown
    assert "the CPU compiler over emulated devices" in shown
    assert said["flags"] == "--mesh data=4,model=2 --accumulate 1 --remat True --unroll 1"


def test_a_teacher_is_compiled_with_its_student(tmp_path):
    (tmp_path / "taught").mkdir()
    teacher = dataclasses.replace(RUN, model=dataclasses.replace(SHAPE, layers=1), policy="fp")
    (tmp_path / "taught" / "config.json").write_text(json.dumps({"format": 1, "run": to_json(teacher)}))
    student = dataclasses.replace(RUN, loss="ad", teacher=str(tmp_path / "taught"))
    student = dataclasses.replace(student, model=dataclasses.replace(SHAPE, layers=1))
    found = compile_step(student, Layout(8, 1, 1, "full"), parse("cpu:8"), "cpu")
    assert found.teacher == pytest.approx(found.parameters, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--target", "v9z-64"), ["unknown target 'v9z-64'", "h100x8"]),
        (("--target", "v5e-9"), ["no slice v5e-9", "v5e-16"]),
        (("--target", "cpu:8", "--mesh", "data=3"), ["data=3 does not divide data.batch=16", "model.dim=64"]),
        (("--target", "cpu:8", "--mesh", "data=16"), ["needs 16 devices, 8 are here"]),
        (("--target", "cpu:8", "--mesh", "rows=2"), ["unknown mesh axis 'rows'"]),
        (("--target", "cpu:8", "--accumulate", "5"), ["accumulate=5", "no mesh of cpu:8 divides", "[1, 2, 4"]),
        (("--target", "cpu:8", "--remat", "some"), ["--remat", "some"]),
        (("--target", "cpu:8", "--unroll", "0"), ["unroll=0 must be at least 1"]),
        (("--target", "cpu:8", "--compiler", "gcc"), ["unknown compiler 'gcc'", "auto, cpu, cuda, tpu"]),
        (("--target", "cpu:8", "--compiler", "tpu"), ["compiler tpu does not compile for cpu:8"]),
        (("--target", "cpu:999"), ["999 emulated devices are needed", "JAX_NUM_CPU_DEVICES=999"]),
        (("--target", "cpu:8", "--set", "stepz=1"), ["unknown field 'stepz'"]),
        (("--target", "cpu:8", "--set", "policy=nope"), ["unknown policy 'nope'"]),
        (("--target", "cpu:8", "--set", "loss=ad", "--set", "teacher=runs/x"), ["neither a run directory nor named"]),
    ],
)
def test_bad_input(arguments, says, refused):
    refused(*says, arguments=arguments)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_a_compiler_that_is_missing(refused):
    refused("compiler tpu needs libtpu", "pip install 'fbi[tpu]'", "--compiler cpu",
            arguments=("--target", "v5e-8", "--compiler", "tpu"))  # fmt: skip


def test_a_run_that_cannot_fit(refused):
    shape = dataclasses.replace(SHAPE, dim=8192, layers=48, heads=32, kv_heads=32, ff=22_016)
    seven = dataclasses.replace(RUN, name="seven", model=shape, data=dataclasses.replace(RUN.data, batch=256))
    refused(
        "seven does not fit v5e-4: estimated", "GiB more than the 15.7", "v5e-", "would, by its estimate",
        run=seven, arguments=("--target", "v5e-4", "--compiler", "cpu"),
    )  # fmt: skip
    refused(
        "does not fit v5e-256", "no larger target of v5e would",
        run=dataclasses.replace(seven, model=dataclasses.replace(seven.model, layers=2000)),
        arguments=("--target", "v5e-256", "--compiler", "cpu"),
    )  # fmt: skip


@pytest.fixture
def memory(monkeypatch):
    """Gives a CPU so many bytes for a program, as a chip has."""

    def of(size):
        monkeypatch.setitem(CHIPS, "cpu", dataclasses.replace(CHIPS["cpu"], memory=float(size)))

    return of


def test_the_next_layout_is_compiled_where_the_best_does_not_fit(memory):
    memory(2.4e6)  # without remat 1.99 are estimated and 2.83 needed, with products 1.54 and 1.77
    said = []
    found = preflight(RUN, parse("cpu:8"), mesh="data=4,model=2", accumulate=2, say=said.append)
    assert found["remat"] == "products"
    assert found["memory"]["peak"] < 2.4e6
    assert len(said) == 1
    assert said[0].startswith("--mesh data=4,model=2 --accumulate 2 --unroll 1 needs ")
    assert said[0].endswith("--accumulate 2 --remat True --remat-keeps products --unroll 1 is next")


def test_a_program_that_does_not_fit_says_what_would(memory, refused):
    memory(1.3e6)
    refused(
        "small does not fit cpu:8: compiled, --mesh data=4,model=2 --accumulate 2 --remat True",
        "--accumulate 4 --remat True", "would, by its estimate",
        arguments=("--target", "cpu:8", "--mesh", "data=4,model=2", "--accumulate", "2", "--remat", "full"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 18.53G "
            "of 15.75G hbm. Exceeded hbm capacity by 2.78G.",
            18.53 * 2**30,
        ),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (70.45G) exceeds available HBM (15.75G). HLO module: jit_step.\nSee https://openxla.org/xla/",
            70.45 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 512.5MiB.", 512.5 * 2**20),
    ],
)
def test_what_compilers_say_of_too_large_programs_is_read(text, needed):
    error = refusal(text, Layout(4, 2), parse("v5e-8"))
    assert isinstance(error, TooLarge)
    assert error.needed == pytest.approx(needed)


def test_other_refusals_of_a_compiler_are_one_line():
    error = refusal("INTERNAL: Mosaic failed\nstack", Layout(4, 2), parse("v5e-8"))
    assert not isinstance(error, TooLarge)
    assert str(error) == "the compiler of v5e-8 refused data=4,model=2: INTERNAL: Mosaic failed"


def test_rows_of_experiments(capsys):
    assert main(["preflight", "experiments/fbi_llm.py", "--target", "cpu:8"]) == 2
    assert "--only '*' names 3 runs of experiments/fbi_llm.py; name one of 130m, 1.3b, 7b" in capsys.readouterr().err
    assert main(["preflight", "experiments/survey.py", "--target", "cpu:8", "--scale", "big"]) == 2
    assert "unknown scale 'big'" in capsys.readouterr().err


def test_every_entry_of_the_table_names_a_run(tmp_path):
    keys = {book.key_of(entry, target) for entry in book.ENTRIES for target in entry.targets}
    assert len(keys) == sum(len(entry.targets) for entry in book.ENTRIES)
    assert all(parse(target).count for entry in book.ENTRIES for target in entry.targets)
    assert all(sum(target.startswith("v") for target in e.targets) >= 3 and "h100x8" in e.targets for e in book.ENTRIES)
    assert "Not compiled yet" in book.page(tmp_path)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="NOT TESTED: the TPU compiler is not installed; pip install 'fbi[tpu]' and run this again",
)
@pytest.mark.slow
def test_the_tpu_compiler():
    said = preflight(RUN, parse("v5e-4"), mesh="data=4", remat="full", compiler="tpu")
    assert said["compiler"] == "tpu"
    gathers = [c for c in said["collectives"] if c["kind"] == "all-gather"]
    # forwards and backwards; what products alone read travels in bfloat16, in which a TPU multiplies by default
    assert sum(c["bytes"] for c in gathers) >= 2 * 3 * 2 * (4 * 64 * 64 + 3 * 64 * 128)
    assert said["memory"]["peak"] < 1e9
    # an axis of the torus of 8 x 8 is split between both axes of the mesh
    assert meshes.make({"data": 32, "model": 2}, devices(parse("v6e-64"), "tpu")).shape == {"data": 32, "model": 2}
    with pytest.raises(InputError, match="does not fit v5e-4"):
        preflight(dataclasses.replace(RUN, data=dataclasses.replace(RUN.data, batch=1 << 22)), parse("v5e-4"),
                  mesh="data=4", accumulate=1)  # fmt: skip
