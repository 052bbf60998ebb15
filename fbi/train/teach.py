"""A teacher's table: its likeliest next tokens at every position of every training window, computed once.

Shard by shard: a shard that is there is whole, so that an interrupted command goes on with the next. The batches of a
shard are the same whichever shard comes before, and so are its bytes.
"""

import dataclasses
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from fbi.data import DataConfig, Windows
from fbi.data import config as data_config
from fbi.data.table import FORMAT, META, PLAN, Layout, Rows, Table, shard_path, source_of
from fbi.errors import InputError
from fbi.fields import hashed
from fbi.files import claimed, file_hash, make_directory, read_json, write_json
from fbi.model import Model, Params
from fbi.train import mesh as meshes
from fbi.train.checkpoint import Checkpoints, fingerprint
from fbi.train.compose import prepared
from fbi.train.likeliest import sampled, top
from fbi.train.load import check_teacher, load_teacher
from fbi.train.progress import Reporter
from fbi.train.run import differences
from fbi.train.rundir import read_run
from fbi.train.step import documents_of

SHARD_BYTES = 128 << 20  # of a shard, about, where its windows are not given


@dataclasses.dataclass(frozen=True)
class Teaching:
    """How a table is made. What changes its content: `k`, `drawn` and `dtype`."""

    k: int = 64
    """Tokens kept at each position."""
    drawn: int | None = None
    """Of these, how many are drawn from the tail, see `sampled`; None: a quarter, unless k is the vocabulary."""
    dtype: str = "float16"
    """Of log-probabilities: float16 or float32."""
    batch: int = 32
    """Windows computed at once, over all devices."""
    shard: int = 0
    """Windows in a file; 0: as many as make about 128 MiB."""
    mesh: str = ""
    """Axes and sizes, such as data=4,model=2; empty: every device on the data axis."""
    line_every: float = 10.0
    """Seconds between progress lines where standard output is not a terminal."""


def teach(directory: str | Path, out: str | Path, data: DataConfig, teaching: Teaching = Teaching()) -> Table:
    """Writes the table of the finished run in `directory` over the training windows of `data`, or goes on with it.

    Returns it where it is done. `InputError` for another tokenizer than the teacher's, and for a folder that holds
    something else or the beginning of another table.
    """
    directory, out = Path(directory), Path(out)
    data_config.check(data)
    run = dataclasses.replace(read_run(directory), teacher=str(directory), data=data)
    check_teacher(run)
    layout = Layout(data.window, run.model.vocab, teaching.k, teaching.dtype, _drawn(teaching, run.model.vocab))
    for name, value, least in (("batch", teaching.batch, 1), ("shard", teaching.shard, 0)):
        if value < least:
            raise InputError(f"{name}={value} must be at least {least}")
    sizes = meshes.parse(teaching.mesh, jax.device_count())
    meshes.check(sizes, run.model, teaching.batch, 1, "teacher")
    per_window = layout.window * layout.bytes_per_token
    shard = teaching.shard or max(1, SHARD_BYTES // per_window // teaching.batch) * teaching.batch
    if jax.process_count() > 1:
        raise InputError(f"fbi teach runs in one process, these are {jax.process_count()}; start it on one host")
    _refuse_foreign(out)
    windows = prepared(run, teaching.line_every)
    mesh = meshes.make(sizes)
    with jax.set_mesh(mesh):
        model, params = load_teacher(run, windows.tokenizer)
        plan = {
            "format": FORMAT,
            "source": source_of(windows, data.mask_documents),
            "layout": hashed(layout),
            "teacher": {
                "run": read_run(directory).hash,
                "step": Checkpoints(directory / "checkpoints").steps[-1],
                "parameters": fingerprint(params),
            },
            "shard": shard,
        }
        separator = windows.tokenizer.separator if data.mask_documents else None
        rows = told(model, layout, separator)
        with claimed(make_directory(out) / ".lock") as lock:
            if lock is None:
                raise InputError(f"{out} is in use by another process; wait for it or stop it")
            _begin(out, plan)

            def compute(*batch: np.ndarray) -> Rows:
                return rows(params, *(meshes.put_batch(part, mesh) for part in batch))

            _write(out, windows, layout, shard, teaching, compute)
            return _finish(out, plan)


def _drawn(teaching: Teaching, vocab: int) -> int:
    if teaching.drawn is not None:
        return teaching.drawn
    return 0 if teaching.k >= vocab else teaching.k // 4


def told(
    model: Model, layout: Layout, separator: int | None
) -> Callable[[Params, Int[Array, "b 1"], Int[Array, "b t"]], Rows]:
    """The compiled function (params, numbers of windows [b, 1], tokens [b, t]) -> `Rows`, in float32 at least.

    What is drawn depends on the number of the window alone.
    """

    def start(number: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.key(0), number), (layout.window,))

    def of_part(numbers: Array, logits: Array) -> Rows:
        if not layout.drawn:
            return Rows(*top(logits, layout.k))
        return Rows(*sampled(logits, layout.k, layout.drawn, jax.vmap(start)(numbers[:, 0])))

    @jax.jit
    def rows(params: Params, numbers: Array, tokens: Array) -> Rows:
        logits = model.apply(params, tokens, documents_of(tokens, separator))
        split = jax.P(jax.typeof(logits).sharding.spec[0], None, None)
        # Each device has whole rows: top-k and scatter run on them as they lie.
        return jax.shard_map(
            of_part, in_specs=(jax.P(*split[:2]), split), out_specs=Rows(split, split, jax.P(*split[:2]))
        )(numbers, jax.sharding.reshard(logits, split))

    return rows


def _finish(out: Path, plan: dict[str, Any]) -> Table:
    """Writes meta.json of a table whose shards are all there, and opens it."""
    if not (out / META).exists():
        paths = [shard_path(out, number) for number in range(_shards(plan["source"]["windows"], plan["shard"]))]
        shards = [{"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in paths]
        predictions = plan["source"]["windows"] * plan["source"]["window"]
        stored = sum(row["bytes"] for row in shards) / predictions
        write_json(out / META, plan | {"shards": shards, "bytes_per_token": stored})
    return Table(out)


def _shards(windows: int, shard: int) -> int:
    return -(-windows // shard)


def _refuse_foreign(out: Path) -> None:
    """Refuses a folder that holds something and is no table."""
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if PLAN not in names and (others := [name for name in names if not name.startswith((".lock", f".{PLAN}"))]):
        raise InputError(f"{out} is neither empty nor a table of a teacher: it holds {', '.join(others[:5])}")


def _begin(out: Path, plan: dict[str, Any]) -> None:
    """Writes plan.json, or checks that it is this one: another is refused, naming what differs."""
    for half in (out / "shards").glob(".*"):  # of a process that was killed
        half.unlink()
    if not (out / PLAN).exists():
        write_json(out / PLAN, plan)
    elif changed := differences(_spelt_out(read_json(out / PLAN)), _spelt_out(plan)):
        raise InputError(
            f"{out} was begun as another table; it differs in {'; '.join(changed)}. "
            "Use another directory, or give the same arguments"
        )


def _spelt_out(plan: dict[str, Any]) -> dict[str, Any]:
    """With what a layout leaves out where it is zero."""
    return plan | {"layout": {"drawn": 0} | plan.get("layout", {})}


def _write(
    out: Path, windows: Windows, layout: Layout, shard: int, teaching: Teaching, compute: Callable[..., Rows]
) -> None:
    """Makes the shards that are not there yet; `compute` is told the numbers of windows [b, 1] and their tokens."""
    count, source = windows.count("train"), windows.source("train")
    parts = [range(first, min(first + shard, count)) for first in range(0, count, shard)]
    missing = [(number, part) for number, part in enumerate(parts) if not shard_path(out, number).exists()]
    done = count - sum(len(part) for _, part in missing)
    with Reporter("teach", count, done, unit="window", line_every=teaching.line_every) as reporter:
        if done and missing:
            reporter.say(f"teach: continuing, {done} of {count} windows are there")
        for number, part in missing:
            with _shard_writer(shard_path(out, number)) as writer:
                for first in range(part.start, part.stop, teaching.batch):
                    chosen = range(first, min(first + teaching.batch, part.stop))
                    records = source.__getitems__(chosen)
                    tokens = np.frombuffer(b"".join(records), windows.dtype).reshape(len(chosen), -1)[:, :-1]
                    # The last batch is filled up: one compiled program for all.
                    full = ((0, teaching.batch - len(chosen)), (0, 0))
                    numbers = np.asarray(chosen, np.int32)[:, None]
                    computed = compute(np.pad(numbers, full), np.pad(tokens.astype(np.int32), full))
                    rows = Rows(*(np.asarray(x)[: len(chosen)] for x in jax.device_get(computed)))
                    for record in layout.pack(rows):
                        writer.write(record)
                    done += len(chosen)
                    rate = (done - reporter.start) * layout.window / max(reporter.elapsed, 1e-9)
                    reporter.update(done, f"{rate:,.0f} tokens/s")


class _shard_writer:
    """An ArrayRecord writer to a file that has its name once it is whole and on disk."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> Any:
        from array_record.python.array_record_module import ArrayRecordWriter

        make_directory(self._path.parent)
        handle, self._temporary = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
        os.close(handle)
        self._writer = ArrayRecordWriter(self._temporary, "group_size:1")  # one record a group: for random access
        return self._writer

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            self._writer.close()
            if kind is None:
                descriptor = os.open(self._temporary, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
                os.chmod(self._temporary, 0o644)
                os.replace(self._temporary, self._path)
        except (OSError, RuntimeError) as problem:
            raise InputError(f"cannot write {self._path}: {problem}; free some space and start again") from problem
        finally:
            Path(self._temporary).unlink(missing_ok=True)
