"""Bad input of every kind: one clear line on standard error, exit code 2, and nothing half-made left behind."""

import gzip
import json
import shutil

import pytest
from outcome import EXECUTION, ONE_DEVICE, assignments, contents, listing, refused

from fbi.train.run import Run, to_json


@pytest.fixture
def new(tmp_path):
    """Where a run is to go, of which nothing must be there in the end."""
    directory = tmp_path / "runs" / "new"
    yield directory
    assert not directory.exists()
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


@pytest.fixture
def copied(teacher, tmp_path):
    """A copy of a finished run, to be spoilt."""
    return shutil.copytree(teacher, tmp_path / "copied")


# ---- config files


def config(**fields):
    return json.dumps({"format": 1, "run": to_json(Run()) | fields})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(None, ["cannot read", "run.json", "No such file"], id="missing"),
        pytest.param("{nope", ["run.json is not JSON", "line 1, column 2"], id="not JSON"),
        pytest.param(b"\xff\xfe", ["run.json is not UTF-8 text", "byte 0"], id="not text"),
        pytest.param("[1]", ["it needs the fields 'format' and 'run'"], id="not an object"),
        pytest.param('{"steps": 3}', ["it needs the fields 'format' and 'run'"], id="bare"),
        pytest.param('{"format": 1, "run": 3}', ["must be an object with fields, not 3"], id="no fields"),
        pytest.param(
            config(stepz=3),
            ["unknown field 'stepz'", "did you mean 'steps'", "valid: data, final_windows, grouping"],
            id="field",
        ),
        pytest.param(config(data={"bach": 3}), ["unknown field 'data.bach'", "did you mean 'data.batch'"], id="inner"),
        pytest.param(config(steps="many"), ["run.json: steps='many' is not a whole number"], id="type"),
        pytest.param(config(steps=True), ["steps=True is not a whole number"], id="boolean"),
        pytest.param(config(policy=None), ["policy=None is not text"], id="null"),
        pytest.param(config(data=[1]), ["data must be an object with fields, not [1]"], id="list"),
        pytest.param(config(model="giant"), ["unknown model 'giant'", "nano"], id="preset"),
        pytest.param(config(optimizer={"lr": float("nan")}), ["optimizer.lr=nan is not a finite number"], id="nan"),
        pytest.param(
            json.dumps({"format": 7, "run": {}}), ["has format 7", "reads format 1", "start a new run"], id="format"
        ),
    ],
)
def test_a_config_file(content, says, fbi, new, tmp_path):
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(fbi("train", new, "--config", path, *EXECUTION), *says)


# ---- settings that the run's own values refute, before anything is read or written


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        pytest.param(["policy=nonsense"], ["unknown policy 'nonsense'", "bitnet-b158", "fbi"], id="policy"),
        pytest.param(["policy=layers.*: fbi"], ["'fbi' names neither w nor a", "GLOB: w=METHOD"], id="malformed rule"),
        pytest.param(["policy=layers.{0: w=fbi"], ["'layers.{0' has unbalanced"], id="braces"),
        pytest.param(["policy=layers.*: w=fbj"], ["unknown method 'fbj'", "did you mean 'fbi'", "absmax"], id="method"),
        pytest.param(
            ["policy=layers.*: w=fbi:bits=2"],
            ["unknown fbi option 'bits'", "valid: frozen, granularity"],
            id="method option",
        ),
        pytest.param(
            ["policy=layers.*: w=fbi:granularity=row"], ["granularity='row'", "input|output|tensor"], id="option value"
        ),
        pytest.param(["policy=layers.*: w=absmax:bits=99"], ["bits=99", "allowed: 2|3|4|5|6|7|8"], id="option range"),
        pytest.param(["policy=layers.*: a=fbi"], ["'fbi' cannot take the role activation", "absmax"], id="role"),
        pytest.param(
            ["policy=layers.9.*: w=fbi"], ["'layers.9.*: w=fbi' matches nothing", "0..0"], id="unmatched rule"
        ),
        pytest.param(
            ["policy=layers.*: w=fbi | layers.0.*: w=none"],
            ["'layers.0.*: w=none' matches nothing", "earlier rules take every site"],
            id="shadowed rule",
        ),
        pytest.param(["policy=*: w=fbi"], ["embedding keeps no learned scales", "'embed: w=none' before"], id="embed"),
        pytest.param(["loss=xent"], ["unknown loss 'xent'", "valid: ", "ad, cakld, ce"], id="loss"),
        pytest.param(["loss=ad:temp=2"], ["unknown ad option 'temp'", "temperature, top_k"], id="loss option"),
        pytest.param(["loss=ad:temperature=0"], ["temperature=0.0 must be above 0"], id="temperature of the loss"),
        pytest.param(["loss=ad"], ["loss='ad' needs a teacher", "set teacher"], id="no teacher"),
        pytest.param(["teacher=runs/t"], ["loss='ce' does not look at teacher='runs/t'", "use loss=ad"], id="no need"),
        pytest.param(["model=giant"], ["unknown model 'giant'", "fbi-130m", "nano"], id="model preset"),
        pytest.param(
            ["model.heads=4", "model.kv_heads=3"], ["model.kv_heads=3", "heads=4", "[1, 2, 4]"], id="kv_heads"
        ),
        pytest.param(["model.head_dim=15"], ["model.head_dim=15 is odd", "even"], id="head_dim"),
        pytest.param(["model.dtype=float16"], ["unknown model.dtype 'float16'", "bfloat16, float32"], id="dtype"),
        pytest.param(["model.router=dejavu"], ["unknown model.router 'dejavu'", "low-rank, noisy"], id="router"),
        pytest.param(["model.router=noisy"], ["model.router=noisy needs experts", "set model.expert"], id="no experts"),
        pytest.param(["model.expert=8", "model.top_k=99"], ["model.top_k=99", "below the", "experts"], id="top k"),
        pytest.param(["pruning=wander"], ["unknown pruning 'wander'", "did you mean 'wanda'"], id="pruning"),
        pytest.param(["pruning=wanda"], ["pruning='wanda' needs trained weights", "set start"], id="nothing to prune"),
        pytest.param(["loss=prediction"], ["prediction trains routers", "model.routing=dense"], id="no predictor"),
        pytest.param(["data.window=65"], ["data.window=65 exceeds model.context=64", "lower it"], id="context"),
        pytest.param(["data.batch=0"], ["batch is 0", "at least 1"], id="batch"),
        pytest.param(["data.corpus=web:x"], ["unknown corpus 'web:x'", "sotu, text:PATH, tfds:NAME"], id="corpus kind"),
        pytest.param(["data.tokenizer=bpe:10"], ["'bpe:10'", "at least 257", "bpe:1024"], id="bpe too small"),
        pytest.param(["data.validation=1"], ["validation is 1.0", "below 1"], id="share"),
        pytest.param(["steps=-3"], ["steps=-3 must be at least 1"], id="negative steps"),
        pytest.param(["steps=1.5"], ["steps='1.5' is not a whole number"], id="broken steps"),
        pytest.param(["steps=9" + "0" * 30], ["must be below 2147483648"], id="large steps"),
        pytest.param(["optimizer.warmup=1e30"], ["optimizer.warmup=1e+30 is out of range"], id="warm-up"),
        pytest.param(["optimizer.b2=1"], ["optimizer.b2=1.0 is out of range", "below 1"], id="beta"),
        pytest.param(["optimizer.eps=0"], ["optimizer.eps=0.0 is out of range", "above 0"], id="epsilon"),
        pytest.param(["seed=-1"], ["seed=-1 must be at least 0 and below 4294967296"], id="seed"),
        pytest.param(["seed=99999999999999999999"], ["seed=99999999999999999999 must be"], id="large seed"),
        pytest.param(["optimizer.lr=fast"], ["optimizer.lr='fast' is not a number"], id="learning rate, text"),
        pytest.param(["optimizer.lr=nan"], ["optimizer.lr=nan is not a finite number"], id="learning rate, nan"),
        pytest.param(["optimizer.lr=inf"], ["optimizer.lr=inf is not a finite number"], id="learning rate, inf"),
        pytest.param(["optimizer.lr=-1"], ["optimizer.lr=-1.0 is out of range", "at least 0"], id="learning rate < 0"),
        pytest.param(["optimizer.schedule=linear"], ["'linear'", "cosine, two-stage, wsd"], id="schedule"),
        pytest.param(["guard.spike=0"], ["guard.spike=0.0 must be above 0"], id="spike"),
        pytest.param(["stepz=3"], ["unknown field 'stepz'", "did you mean 'steps'"], id="field"),
        pytest.param(["steps"], ["'steps' is not FIELD=VALUE", "--set data.batch=8"], id="no value"),
        pytest.param(["data=3"], ["--set data: give one of its fields: data.corpus"], id="whole part"),
    ],
)
def test_a_setting(settings, says, train, new, cache):
    before = listing(cache)
    refused(train(new, *settings), *says)
    assert listing(cache) == before


@pytest.mark.parametrize(
    ("execution", "says"),
    [
        pytest.param(["--mesh", "data=3"], ["data=3 does not divide data.batch=4", "model.dim=32"], id="batch"),
        pytest.param(["--mesh", "model=4"], ["model=4 does not divide model.heads=2"], id="heads"),
        pytest.param(["--mesh", "data=16"], ["'data=16' needs 16 devices, 8 are here"], id="devices"),
        pytest.param(["--mesh", "tensor=2"], ["unknown mesh axis 'tensor'", "valid: data, model"], id="axis"),
        pytest.param(["--mesh", "data=two"], ["data='two' is not a whole number", "write data=4,model=2"], id="size"),
        pytest.param(["--profile", "10-15"], ["profile='10-15' is not FIRST:LAST", "write 10:15"], id="profile"),
        pytest.param(
            ["--profile", "2:1000000"], ["profile='2:1000000' must name steps from 1 to"], id="profiled steps"
        ),
        pytest.param(["--grace", "-1"], ["grace=-1.0 must be at least 0 seconds"], id="grace"),
        pytest.param(["--mesh", "data=²"], ["data='²' is not a whole number"], id="superscript"),
        pytest.param(["--accumulate", "3"], ["accumulate=3 does not divide data.batch=4"], id="accumulate"),
        pytest.param(["--loss-chunk", "-1"], ["loss_chunk=-1 must be at least 0"], id="chunk"),
        pytest.param(["--gather", "bits"], ["bits", "values", "codes"], id="gather"),
        pytest.param(["--checkpoint-every", "0"], ["checkpoint_every=0 must be at least 1"], id="interval"),
    ],
)
def test_an_execution(execution, says, train, new):
    refused(train(new, execution=(*ONE_DEVICE, *execution)), *says)


# ---- data


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        pytest.param("none", None, ["no file or folder", "none", "text:PATH"], id="missing"),
        pytest.param("~nobody-of-that-name/x", None, ["no file or folder ~nobody-of-that-name/x"], id="user"),
        pytest.param("a.txt", b"abc\0def", ["a.txt is not text: NUL at byte 3", "give UTF-8"], id="binary"),
        pytest.param("a.txt", b"abc\xff\xfe", ["a.txt is not UTF-8 text", "byte 3", "convert it"], id="utf-8"),
        pytest.param("a.txt", b" \n", ["holds no text"], id="empty"),
        pytest.param("a.txt", b"much too short\n", ["less than one window of 16 + 1", "give more text"], id="short"),
        pytest.param(
            "a.txt.gz", gzip.compress(b"text " * 99)[:20], ["not a whole gzip file", "make or fetch"], id="gz"
        ),
        pytest.param("a.txt.gz", b"text", ["a.txt.gz is not a whole gzip file", "make or fetch"], id="no gz"),
        pytest.param("a.png", b"text", ["a.png has an unknown suffix", ".txt, .txt.gz"], id="suffix"),
        pytest.param(
            "a.jsonl", b'{"body": "x"}\n', ["a.jsonl:1 has no field 'text'", "body", "data.field"], id="jsonl field"
        ),
        pytest.param("a.jsonl", b'{"text": "x"}\n{"te', ["a.jsonl:2 is not JSON", "column"], id="jsonl"),
    ],
)
def test_a_corpus(name, content, says, train, new, tmp_path, cache):
    path = name if name.startswith("~") else tmp_path / name
    if content is not None:
        path.write_bytes(content)
    before = listing(cache)
    refused(train(new, f"data.corpus=text:{path}"), *says)
    made = {path.partition("/")[0] for path in listing(cache) - before if "/" in path}
    assert made <= {"corpora", "tokenizers"}  # each whole: a short corpus fails only when it is cut into windows
    assert not list(cache.rglob(".*"))


def test_a_tfds_name(train, new):
    refused(
        train(new, "data.corpus=tfds:mnits"), "unknown TFDS data set 'mnits'", "did you mean", "mnist", "list_builders"
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(None, ["cannot read", "mine.json", "bpe:VOCAB or the path of a tokenizer.json"], id="missing"),
        pytest.param("{", ["mine.json is not JSON"], id="no JSON"),
        pytest.param('{"a": 1}', ["mine.json is not a tokenizer.json"], id="no tokenizer"),
    ],
)
def test_a_tokenizer(content, says, train, new, tmp_path):
    if content is not None:
        (tmp_path / "mine.json").write_text(content)
    refused(train(new, f"data.tokenizer={tmp_path / 'mine.json'}"), *says)


def test_a_tokenizer_larger_than_the_model(train, new, teacher):
    says = ["the tokenizer has 300 tokens, model.vocab is 290", "set model.vocab=300 or use a smaller tokenizer"]
    refused(train(new, "model.vocab=290"), *says)


def test_the_data_command_refuses_the_same(fbi, tmp_path):
    refused(fbi("data", *assignments(f"data.corpus=text:{tmp_path / 'none'}")), "no file or folder")
    refused(fbi("data", *assignments("data.tokenizer=wordpiece")), "cannot read wordpiece", "bpe:VOCAB")


# ---- teachers


def student(directory):
    return ("policy=fbi", "loss=ad", f"teacher={directory}")


def test_a_teacher_that_is_not_there(train, new, tmp_path):
    refused(train(new, *student(tmp_path / "none")), "none is not a run directory", "`fbi train` makes one")


def test_a_teacher_that_is_not_finished(train, new, copied):
    (copied / "done.json").unlink()
    refused(train(new, *student(copied)), "is not finished", f"finish it with `fbi train {copied}`")


def test_a_teacher_of_another_vocabulary(train, new, teacher):
    says = ["has a vocabulary of 300, this run of 320", "use the same data.tokenizer and model.vocab"]
    refused(train(new, *student(teacher), "model.vocab=320"), *says)


def test_a_teacher_of_another_tokenizer(train, new, teacher):
    says = ["was trained with another tokenizer", f"use its {teacher / 'tokenizer.json'} as data.tokenizer"]
    refused(train(new, *student(teacher), "data.tokenizer=bpe:280"), *says)


def test_a_teacher_of_a_shorter_context(train, new, teacher):
    settings = ("data.window=80", "model.context=128")
    refused(train(new, *student(teacher), *settings), "has a context of 64, less than data.window=80", "use shorter")


def test_a_teacher_that_the_mesh_does_not_divide(train, new, teacher):
    settings = ("model.heads=4", "model.kv_heads=4", "model.head_dim=8")
    ended = train(new, *student(teacher), *settings, execution=("--mesh", "model=4"))
    refused(ended, "model=4 does not divide teacher.heads=2")


def test_a_teacher_without_a_checkpoint(train, new, copied):
    shutil.rmtree(copied / "checkpoints")
    refused(train(new, *student(copied)), "there are no checkpoints in")


# ---- starting points


def test_a_start_that_is_not_there(train, new, tmp_path):
    says = ["neither a run directory, a folder of safetensors, nor 'smollm2-135m'"]
    refused(train(new, f"start={tmp_path / 'none'}"), *says)
    refused(train(new, "start=smollm3"), "start='smollm3'", *says)


def test_a_start_that_is_a_pickle(train, new, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(train(new, f"start={folder}"), "pytorch_model.bin is a pickle", "is not read; convert it to safetensors")


def test_a_start_of_another_shape(train, new, teacher):
    refused(train(new, f"start={teacher}", "model.ff=32"), "cannot adapt weights", "ff 64 to 32")


# ---- directories


def test_a_directory_below_a_file(train, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(train(tmp_path / "file" / "run"), "cannot create the folder", "Not a directory", "choose a writable place")
    refused(train(tmp_path / "file"), "cannot create the folder", "File exists")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_of_something_else(train, tmp_path):
    (tmp_path / "novel.txt").write_text("Call me Ishmael.")
    refused(train(tmp_path), "is neither empty nor a run directory", "it holds novel.txt")
    assert contents(tmp_path) == {"novel.txt": b"Call me Ishmael."}
    assert not (tmp_path / ".lock").exists()


def test_a_directory_begun_with_another_run(train, copied):
    before = contents(copied)
    ended = train(copied, "steps=9", "policy=fbi", "data.batch=8")
    refused(ended, "policy: 'fp' -> 'fbi'; data.batch: 4 -> 8; steps: 2 -> 9", "Use another directory")
    assert contents(copied) == before


def test_a_directory_in_use(train, fbi, tmp_path, monkeypatch):
    from fbi.train.rundir import locked

    with locked(tmp_path / "run"):
        refused(train(tmp_path / "run"), "is in use by another process", "wait for it or stop it")


@pytest.mark.parametrize(
    ("file", "content", "command", "says"),
    [
        ("config.json", "{", ["train", "eval", "generate", "show"], ["config.json is not JSON"]),
        ("done.json", "{}", ["train"], ["done.json is damaged: it lacks 'steps'", "delete it"]),
        ("tokenizer.json", "{", ["generate"], ["tokenizer.json is not JSON"]),
    ],
)
def test_a_damaged_run(file, content, command, says, fbi, copied):
    (copied / file).write_text(content)
    before = contents(copied)
    for name in command:
        refused(fbi(name, copied, *(EXECUTION if name == "train" else ())), *says)
    assert contents(copied) == before


@pytest.mark.parametrize("line", ["junk", '{"a": 1}'])
def test_a_damaged_record_stays_as_it_is(line, fbi, train, copied):
    (copied / "done.json").unlink()
    with (copied / "metrics.jsonl").open("a") as file:
        file.write(f"{line}\n")
    before = (copied / "metrics.jsonl").read_bytes()
    last = before.count(b"\n")
    refused(train(copied), f"metrics.jsonl is damaged: line {last} is no row", "restore the file or cut that line")
    shown = fbi("show", str(copied), "--picture", "")  # reading it is no reason to stop: the rest is shown
    assert shown.code == 0
    assert f"metrics.jsonl: line {last} is no row of metrics, left out" in shown.err
    assert (copied / "metrics.jsonl").read_bytes() == before


# ---- commands on runs


@pytest.mark.parametrize("command", ["eval", "generate", "show"])
def test_a_directory_that_is_no_run(command, fbi, tmp_path):
    refused(fbi(command, tmp_path / "none"), "none is not a")
    refused(fbi(command, tmp_path), str(tmp_path), "config.json")
    (tmp_path / "file").write_text("")
    refused(fbi(command, tmp_path / "file"), "file is not a")
    assert contents(tmp_path) == {"file": b""}


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_a_run_without_a_checkpoint(command, fbi, copied):
    shutil.rmtree(copied / "checkpoints")
    refused(fbi(command, copied), "there are no checkpoints in")
    (copied / "checkpoints").mkdir()
    refused(fbi(command, copied), "no checkpoint in", "it has []")
    assert not any((copied / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(["eval", "--split", "dev"], ["unknown split 'dev'", "test, train, validation"], id="split"),
        pytest.param(["eval", "--window", "1"], ["window is 1", "at least 2"], id="window"),
        pytest.param(["eval", "--window", "500"], ["window 500 is more than the model's context 64"], id="long window"),
        pytest.param(["eval", "--stride", "-1"], ["stride is -1", "at least 1"], id="stride"),
        pytest.param(["eval", "--batch", "0"], ["batch is 0"], id="batch"),
        pytest.param(
            ["generate", "--temperature", "-1"], ["temperature is -1.0", "0 (the likeliest"], id="temperature"
        ),
        pytest.param(["generate", "--temperature", "nan"], ["temperature is nan"], id="temperature nan"),
        pytest.param(["generate", "--top-p", "0"], ["top_p is 0.0", "more than 0 and at most 1"], id="top_p"),
        pytest.param(["generate", "--tokens", "0"], ["tokens is 0", "at least 1"], id="tokens"),
        pytest.param(["generate", "--tokens", "100"], ["context of 64", "ask for at most"], id="too many tokens"),
        pytest.param(["generate", "--seed", str(1 << 70)], [f"seed is {1 << 70}", "below 4294967296"], id="seed"),
        pytest.param(["generate", "--prompt", "\udcff"], ["the prompt is not UTF-8 text", "character 0"], id="prompt"),
        pytest.param(["show", "--picture", "x.foo"], ["'x.foo'", ".png, .pdf, .svg"], id="picture"),
    ],
)
def test_an_option(arguments, says, fbi, teacher):
    command, *options = arguments
    before = contents(teacher)
    refused(fbi(command, teacher, *options), *says)
    assert contents(teacher) == before


def test_the_other_commands(fbi, tmp_path):
    refused(fbi("policy", "nope"), "unknown policy 'nope'", "bitnet-b158", "GLOB: w=METHOD")
    refused(fbi("policy", "layers.*: a=fbi"), "'fbi' cannot take the role activation")
    refused(fbi("policy", "fbi", "--model", "nan0"), "unknown model 'nan0'", "did you mean 'nano'")
    refused(fbi("demo", "--directory", tmp_path / "demo", "--steps", "-1"), "steps=-1 must be at least 1")
    assert contents(tmp_path) == {}


# ---- the command line, as a process of its own


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(["tarin", "x"], ["tarin", "demo, data, train"], id="command"),
        pytest.param([], ["Missing subcommand", "demo, data, train"], id="none"),
        pytest.param(["train"], ["fbi train", "RUN_DIR", "required"], id="argument"),
        pytest.param(["train", "x", "--stpes", "3"], ["--stpes", "Unrecognized options"], id="flag"),
        pytest.param(["train", "x", "y"], ["Unrecognized options: y"], id="one too many"),
        pytest.param(["generate", "x", "--tokens", "many"], ["--tokens", "'many'"], id="value"),
        pytest.param(["generate", "x", "--tokens"], ["--tokens", "Missing value"], id="no value"),
        pytest.param(["train", "x", "--set"], ["--set", "Missing value"], id="no setting"),
        pytest.param(["train", "x", "--remat", "maybe"], ["--remat", "maybe"], id="choice"),
        pytest.param(["train", "x", "--config", "none.json"], ["cannot read none.json: No such file"], id="config"),
        pytest.param(["train", "x", "--mesh", "data=64"], ["needs 64 devices", "JAX_NUM_CPU_DEVICES=8"], id="devices"),
        pytest.param(["show", "x"], ["x is not a directory", "config.json"], id="no run"),
    ],
)
def test_the_command_line(arguments, says, console, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = console(*arguments)
    refused(ended, *says)
    assert ended.out == ""
    assert listing(tmp_path) == set()


# ---- a disk that is full


def test_a_full_disk_while_data_are_prepared(console, fbi, tiny, new, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("FBI_CACHE", str(cache))
    ended = console("train", new, *assignments(*tiny), *ONE_DEVICE, limit=4000)
    refused(ended, "cannot write", "File too large", "free some space")
    assert not list(cache.glob("windows/*"))
    assert not list(cache.rglob(".*"))
    assert fbi("data", *assignments(*tiny)).code == 0


def rows(run):
    """The record, without what differs from one execution to the next."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time_")} for row in found]


def test_a_full_disk_while_a_checkpoint_is_written(console, train, tiny, teacher, tmp_path):
    run = tmp_path / "run"
    ended = console("train", run, *assignments(*tiny), *EXECUTION, limit=20_000)
    refused(ended, f"cannot write a checkpoint in {run / 'checkpoints'}: File too large", "the same command continues")
    assert not (run / "done.json").exists()
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
    ended = train(run)
    assert (ended.code, ended.err) == (0, "")
    assert rows(run) == rows(teacher)


def test_a_full_disk_while_the_record_is_written(console, train, tiny, teacher, copied):
    (copied / "done.json").unlink()
    shutil.rmtree(copied / "checkpoints" / "2")
    note = {"kind": "event", "step": 0, "what": "note", "text": "long " * 4000}
    lines = [*(copied / "metrics.jsonl").read_text().splitlines(), json.dumps(note)]
    (copied / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    room = sum(len(line) + 1 for line in lines if json.loads(line)["step"] <= 1) + 9
    ended = console("train", copied, *EXECUTION, limit=room)
    refused(ended, f"cannot write {copied / 'metrics.jsonl'}: File too large", "free some space and start again")
    assert (copied / "metrics.jsonl").stat().st_size <= room
    kept = {path: data for path, data in contents(teacher / "checkpoints").items() if not path.startswith("2/")}
    assert contents(copied / "checkpoints") == kept
    ended = train(copied)
    assert (ended.code, ended.err) == (0, "")
    assert [row for row in rows(copied) if row["kind"] != "event"] == rows(teacher)
