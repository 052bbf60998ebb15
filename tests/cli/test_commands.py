"""Every command: its help, what it prints, what it writes, and what it leaves alone."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
from outcome import EXECUTION, assignments, contents, refused

from fbi.cli import COMMANDS
from fbi.experiment import overlay
from fbi.model.config import PRESETS, count_parameters
from fbi.train import Execution, Run
from fbi.train.run import to_json
from fbi.train.rundir import read_run

NO_JAX = """
import sys
from fbi.cli import main
for arguments in {commands!r}:
    if code := main(arguments):
        sys.exit(f"{{arguments}}: {{code}}")
    if found := {{"jax", "flax", "orbax", "grain", "tensorflow", "tensorflow_datasets"}} & set(sys.modules):
        sys.exit(f"{{arguments}} loaded {{found}}")
"""


@pytest.fixture
def recorded(monkeypatch):
    """Every call to train, which then does nothing: [(run, directory, execution)]."""
    calls = []

    def record(run, directory, execution):
        from fbi.train.compose import Result

        calls.append((run, directory, execution))
        return Result(directory, run.steps, 1.0, 2.0, 3.0)

    monkeypatch.setattr("fbi.train.train", record)
    return calls


# ---- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_command_does_with_an_example(command, fbi):
    ended = fbi(command, "--help")
    assert (ended.code, ended.err) == (0, "")
    words = " ".join(re.sub("[│╭╮╰╯─]", " ", ended.out).split())
    assert f"For example: fbi {command}" in words
    assert f"usage: fbi {command}" in words
    assert "ARG" not in words  # every argument is named for what it is


def test_the_help_of_all_names_every_command(fbi):
    ended = fbi("--help")
    assert (ended.code, ended.err) == (0, "")
    for command in COMMANDS:
        assert f"• {command} " in ended.out
    assert "For example: fbi demo" in ended.out


def test_examples_parse(fbi, recorded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (words,) = re.findall(r"For example: fbi (train .*)", COMMANDS["train"].__doc__ or "")
    assert fbi(*words.split()).code == 0
    ((run, directory, execution),) = recorded
    assert (run.policy, run.steps, directory.name) == ("bitnet-b158", 200, "first")
    assert execution == Execution(mesh="data=1")


def test_what_needs_no_jax_loads_none(teacher, tmp_path):
    helps = [["--help"], *([command, "--help"] for command in COMMANDS)]
    commands = [*helps, ["models"], ["show", str(teacher), "--picture", str(tmp_path / "curves.png")]]
    done = subprocess.run([sys.executable, "-c", NO_JAX.format(commands=commands)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_output_that_nobody_reads_is_no_error():
    read, write = os.pipe()
    os.close(read)
    program = "from fbi.cli import entry; entry()"
    done = subprocess.run([sys.executable, "-c", program, "models"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 141


# ---- train


def test_training_ends_with_a_line(teacher, fbi, tiny):
    done = json.loads((teacher / "done.json").read_text())
    ended = fbi("train", teacher, *assignments(*tiny), *EXECUTION)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == (
        f"teacher: done, 2 steps, validation {done['loss']:.4f} nats/token, perplexity {done['perplexity']:.2f}, "
        f"{done['bits_per_byte']:.4f} bits/byte; {teacher}\n"
    )
    assert done["hash"] == read_run(teacher).hash
    assert {path.name for path in teacher.iterdir()} == {
        ".lock", "checkpoints", "config.json", "done.json", "env.json", "metrics.jsonl", "summary.json",
        "tokenizer.json",
    }  # fmt: skip
    env = json.loads((teacher / "env.json").read_text())
    assert env["execution"]["mesh"] == "data=1"
    assert env["versions"]["jax"]
    kinds = [json.loads(line)["kind"] for line in (teacher / "metrics.jsonl").read_text().splitlines()]
    assert {"train", "eval"} <= set(kinds)


@pytest.mark.parametrize("settings", [(), ("steps=2",)])
def test_a_finished_run_does_nothing(settings, teacher, fbi):
    before, times = contents(teacher), {path: path.stat().st_mtime_ns for path in teacher.rglob("*") if path.is_dir()}
    ended = fbi("train", teacher, *assignments(*settings), "--mesh", "data=1")
    assert ended.code == 0
    assert "teacher: done, 2 steps" in ended.out
    assert contents(teacher) == before
    assert {path: path.stat().st_mtime_ns for path in teacher.rglob("*") if path.is_dir()} == times


def test_a_finished_run_needs_its_teacher_no_more(fbi, tmp_path):
    run = Run(name="student", loss="ad", teacher=str(tmp_path / "gone"))
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"format": 1, "run": to_json(run)}))
    done = {"steps": 500, "loss": 1.0, "perplexity": 2.7, "bits_per_byte": 0.5, "hash": run.hash}
    (folder / "done.json").write_text(json.dumps(done))
    ended = fbi("train", folder, "--mesh", "data=1")
    assert ended.code == 0
    assert "student: done, 500 steps, validation 1.0000" in ended.out


def test_settings_and_a_config_file_give_the_same_run(fbi, recorded, tiny, teacher, tmp_path):
    assert fbi("train", tmp_path / "teacher", *assignments(*tiny), *EXECUTION).code == 0
    assert fbi("train", tmp_path / "other", "--config", teacher / "config.json").code == 0
    assert fbi("train", teacher).code == 0
    by_settings, by_file, by_directory = (run for run, _, _ in recorded)
    assert by_settings == by_file == by_directory == read_run(teacher)
    assert by_settings == overlay(dataclasses.replace(Run(), name="teacher"), tiny)
    assert recorded[0][2] == Execution(mesh="data=1", log_every=1, checkpoint_every=1)
    assert recorded[1][2] == Execution()


def test_settings_come_on_top_of_a_config_file_in_order(fbi, recorded, teacher, tmp_path):
    settings = assignments("steps=5", "model=micro", "model.ff=128", "steps=7", "name=mine")
    assert fbi("train", tmp_path / "run", "--config", teacher / "config.json", *settings, "--remat", "True").code == 0
    ((run, directory, execution),) = recorded
    expected = dataclasses.replace(PRESETS["micro"], ff=128)
    assert run == dataclasses.replace(read_run(teacher), model=expected, steps=7, name="mine")
    assert (directory, execution) == (tmp_path / "run", Execution(remat=True))


def test_a_run_is_named_after_its_directory(fbi, recorded, tmp_path):
    assert fbi("train", tmp_path / "abc").code == 0
    assert recorded[0][0] == Run(name="abc")


def test_a_student_learns_from_the_teacher(train, teacher, tmp_path, fbi):
    settings = ("policy=layers.*.mlp.*: w=fbi", "loss=mix", f"teacher={teacher}", "steps=1")
    ended = train(tmp_path / "student", *settings)
    assert (ended.code, ended.err) == (0, "")
    rows = [json.loads(line) for line in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()]
    (step,) = (row for row in rows if row["kind"] == "train")
    assert 0 < step["floor"] < step["loss"]
    sites = {row["site"] for row in rows if row["kind"] == "scales"}
    assert sites == {f"layers.0.mlp.{name}" for name in ("gate", "up", "down")}
    assert "student: done, 1 steps" in ended.out


# ---- what a run is worth


def numbers(line):
    return [float(word.replace(",", "")) for word in line.split() if re.fullmatch(r"[\d.,]+", word)]


def test_eval_scores_every_token_once(teacher, fbi):
    done = json.loads((teacher / "done.json").read_text())
    ended = fbi("eval", teacher)
    assert (ended.code, ended.err) == (0, "")
    (line,) = (line for line in ended.out.splitlines() if "validation" in line)
    loss, perplexity, bits, tokens, windows = numbers(line)
    assert loss == pytest.approx(done["loss"], abs=1e-4)
    assert perplexity == pytest.approx(done["perplexity"], abs=0.02)
    assert bits == pytest.approx(done["bits_per_byte"], abs=1e-4)
    assert tokens == windows * 16
    assert str(teacher) in ended.out


def test_eval_on_disjoint_windows_is_the_protocol_of_the_paper(teacher, fbi):
    ended = fbi("eval", teacher, "--split", "test", "--window", "16", "--stride", "16", "--batch", "8")
    assert ended.code == 0
    (line,) = (line for line in ended.out.splitlines() if "test " in line)
    loss, perplexity, _, tokens, windows = numbers(line)
    assert tokens == windows * 15  # each window makes one prediction less than it has tokens
    assert 5 < loss < 6
    assert perplexity == pytest.approx(2.718281828**loss, rel=1e-3)
    lapping = fbi("eval", teacher, "--split", "test", "--window", "17", "--stride", "4").out
    assert lapping.splitlines() != ended.out.splitlines()


def test_generate_is_a_function_of_the_seed(teacher, fbi):
    options = ("--prompt", "the state", "--tokens", "12", "--temperature", "1", "--top-p", "1")
    first, again, other = (fbi("generate", teacher, *options, "--seed", seed) for seed in (1, 1, 2))
    assert {ended.code for ended in (first, again, other)} == {0}
    assert first.out == again.out != other.out
    assert first.out.startswith("the state")
    assert len(first.out) > len("the state\n")


def test_show_prints_the_run_and_draws_it(teacher, fbi, tmp_path):
    done = json.loads((teacher / "done.json").read_text())
    ended = fbi("show", teacher, "--picture", tmp_path / "curves.png")
    assert (ended.code, ended.err) == (0, "")
    for words in ("teacher", "fp", f"{done['loss']:.4f}", "finished", str(tmp_path / "curves.png")):
        assert words in ended.out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "picture" not in fbi("show", teacher, "--picture", "").out
    assert not (teacher / "curves.png").exists()


# ---- what there is


def test_data_prints_every_split(teacher, fbi, tiny, cache):
    ended = fbi("data", *assignments(*tiny))
    assert (ended.code, ended.err) == (0, "")
    lines = {line.split()[0]: line for line in ended.out.splitlines() if line.split()}
    found = {split: numbers(lines[split]) for split in ("train", "validation", "test")}
    meta = [json.loads(path.read_text()) for path in cache.glob("windows/*/meta.json")]
    (whole,) = (m for m in meta if m["window"] == 16 and m["vocab"] == 300)
    for split, counts in found.items():
        assert counts == [whole["splits"][split][name] for name in ("documents", "bytes", "tokens", "windows")]
    assert sum(documents for documents, *_ in found.values()) == 60
    assert "vocabulary 300, window 16, unigram entropy" in ended.out
    assert f"in {cache}" in ended.out
    assert fbi("data", "--config", teacher / "config.json").out == ended.out


def test_policy_prints_the_report(fbi):
    import fbi as package

    text = "layers.{0,-1}.*: w=none | layers.*: w=fbi"
    ended = fbi("policy", text, "--model", "fbi-130m")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == f"{package.policy(text).report(package.model('fbi-130m'))}\n"
    assert "layers.1-10.attn.q" in ended.out
    assert fbi("policy").out == fbi("policy", "fbi", "--model", "nano").out


def test_cost_prints_every_product_and_what_is_left_out(fbi):
    from fbi.analysis.cost import cost
    from fbi.policy import Policy

    ended = fbi("cost", "bitnet-3b", "--policy", "bitnet-b158", "--tokens", "512")
    assert (ended.code, ended.err) == (0, "")
    found = cost(PRESETS["bitnet-3b"], Policy.parse("bitnet-b158"), 512)
    lines = {line.strip().split("  ")[0]: line for line in ended.out.splitlines() if line.strip()}
    for product in found.products:
        assert f"{1e3 * product.energy[7].total:,.4f}" in lines[product.site]
    assert f"{found.macs / 1e9:,.3f}" in lines["all"]
    assert "data movement is left out" in ended.out
    assert f"{found.paper_bytes / 1e6:,.2f} MB as papers print it" in ended.out
    assert f"{found.stored_bytes / 1e6:,.2f} MB as a file holds it" in ended.out
    assert fbi("cost", "nano").out == fbi("cost", "nano", "--policy", "fbi", "--tokens", "512").out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nanoo",), ["unknown model 'nanoo'", "did you mean 'nano'"]),
        (("nano", "--policy", "fbii"), ["unknown policy 'fbii'", "did you mean 'fbi'"]),
        (("nano", "--tokens", "0"), ["tokens=0 must be at least 1"]),
        ((), ["MODEL"]),
    ],
)
def test_cost_refuses_bad_input(arguments, says, fbi):
    refused(fbi("cost", *arguments), *says)


def test_methods_lists_the_registry(fbi):
    from fbi.quant import REGISTRY

    ended = fbi("methods")
    assert (ended.code, ended.err) == (0, "")
    lines = {line.split()[0]: line for line in ended.out.splitlines() if line[:2] != "  " and line.split()}
    for name, entry in REGISTRY.items():
        assert entry.paper in lines[name]
        assert entry.summary in lines[name]
        for option in entry.options:
            assert f"{option}=" in lines[name]
    assert sorted(REGISTRY) == [name for name in lines if name in REGISTRY]


def test_models_lists_the_presets(fbi):
    ended = fbi("models")
    assert (ended.code, ended.err) == (0, "")
    lines = {line.split()[0]: line for line in ended.out.splitlines() if line.split()}
    for name, config in PRESETS.items():
        assert f"{count_parameters(config).total:,d}" in lines[name].split()
        assert f"{config.dim}" in lines[name].split()


def test_the_flags_of_the_demo_arrive(fbi, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("fbi.demo.demo", lambda *arguments: calls.append(arguments))
    assert fbi("demo", "--directory", tmp_path / "demo", "--steps", "3", "--mesh", "data=1").code == 0
    ((directory, steps, execution),) = calls
    assert (directory, steps, execution.mesh) == (tmp_path / "demo", 3, "data=1")


def test_a_signal_is_told_from_bad_input(fbi, monkeypatch, tmp_path):
    from fbi.train.loop import Stopped

    def stop(run, directory, execution):
        raise Stopped(7)

    monkeypatch.setattr("fbi.train.train", stop)
    ended = fbi("train", tmp_path / "run")
    assert (ended.code, ended.out) == (75, "")
    assert ended.err == "fbi: stopped at step 7; the same command continues\n"


def test_a_signal_at_any_other_time_is_one_line(fbi, monkeypatch, tmp_path):
    def interrupt(run, directory, execution):
        raise KeyboardInterrupt

    monkeypatch.setattr("fbi.train.train", interrupt)
    ended = fbi("train", tmp_path / "run")
    assert (ended.code, ended.err) == (130, "fbi: interrupted\n")


def test_a_fault_of_the_program_is_not_hidden(fbi, monkeypatch, tmp_path):
    def fail(run, directory, execution):
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr("fbi.train.train", fail)
    with pytest.raises(ZeroDivisionError, match="a fault"):
        fbi("train", tmp_path / "run")


def test_a_file_that_the_system_refuses_is_one_line(fbi, monkeypatch, tmp_path):
    def fail(run, directory, execution):
        raise PermissionError(13, "Permission denied", "some/file")

    monkeypatch.setattr("fbi.train.train", fail)
    refused(fbi("train", tmp_path / "run"), "Permission denied: some/file")
