"""Who teaches a step: nobody, a model that is in memory, or a table of what a model said (`fbi teach`).

All three answer the same two questions, so that step, accumulation, chunks and diagnostics do not know which it is.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Int

from fbi.data.loader import Batches
from fbi.data.table import Layout, Rows, Table, Taught, TaughtBatches
from fbi.data.windows import Windows
from fbi.errors import InputError
from fbi.files import read_json, write_json
from fbi.loss import Lesson, Loss, from_rows, known, read_out
from fbi.model import Model, Params
from fbi.train import hosts

Features = dict[str, Array]


@runtime_checkable
class Teacher(Protocol):
    """What a step asks of a teacher."""

    def split(self, batch: Any) -> tuple[Int[Array, "b t"], Any]:
        """Tokens [b, t + 1] of a batch, and what the teacher needs of it beside."""
        ...

    def lesson(
        self, params: Params, rows: Any, inputs: Array, documents: Array | None, wanted: tuple[str, ...], cut: bool, /
    ) -> tuple[Lesson | None, Features]:
        """Its logits for these inputs, where `cut` such that only parts of them exist at a time; its features."""
        ...


class Nobody:
    """No teacher."""

    def split(self, batch: Any) -> tuple[Array, None]:
        """The batch is its tokens."""
        return batch, None

    def lesson(self, *given: Any) -> tuple[None, Features]:
        """None."""
        del given
        return None, {}


class Live:
    """A model whose parameters are given to every step."""

    def __init__(self, model: Model):
        self.model = model

    def split(self, batch: Any) -> tuple[Array, None]:
        """The batch is its tokens."""
        return batch, None

    def lesson(
        self, params: Params, rows: Any, inputs: Array, documents: Array | None, wanted: tuple[str, ...], cut: bool, /
    ) -> tuple[Lesson, Features]:
        """The model's forward pass."""
        del rows
        head = ("head",) if cut else ()
        logits, found = self.model.features(params, inputs, documents, wanted=(*wanted, *head))
        if cut:
            return read_out(self.model.head_product(params, found["head"]), self.model.head_logits), found
        return known(logits), found


class Tabled:
    """Rows of a table that came with the batch."""

    def split(self, batch: Taught) -> tuple[Array, Rows]:
        """Tokens and rows."""
        return batch.tokens, batch.rows

    def lesson(self, params: Params, rows: Rows, *rest: Any) -> tuple[Lesson, Features]:
        """See `fbi.loss.completed`; it has no features."""
        del params, rest
        return from_rows(rows), {}


def teaching(who: Model | Teacher | None) -> Teacher:
    """A model as the teacher that it is in memory, None as no teacher."""
    return Live(who) if isinstance(who, Model) else who or Nobody()


class Source(NamedTuple):
    """A teacher ready for a run: what the step is made with, its parameters, and what its batches are read by."""

    teacher: Teacher = Nobody()
    params: Params | None = None
    paired: Callable[[Batches], Batches | TaughtBatches] = lambda batches: batches


def check_table(folder: str, loss: Loss) -> Table:
    """The table, if it can teach this loss: `InputError` for terms over features, and for a top k of its own."""
    table = Table(folder)
    if loss.teacher_features:
        over = [t.kind for t in loss.terms if t.registered.needs_teacher and t.registered.features(dict(t.options))]
        raise InputError(
            f"{', '.join(over)} looks at features of the teacher, and the table {folder} has its probabilities alone; "
            "use the teacher's run directory as teacher, or a loss over logits such as ad"
        )
    for term in loss.terms:
        if term.registered.needs_teacher and dict(term.options).get("top_k"):
            raise InputError(
                f"{term.kind}:top_k={dict(term.options)['top_k']} has no use with the table {folder}, which holds the "
                f"{table.layout.k} likeliest tokens and the mass of all others; drop top_k, or make one of another k"
            )
        if table.layout.drawn and term.registered.needs_teacher and not term.registered.linear(dict(term.options)):
            raise InputError(
                f"{term.kind} as given would be biased by the table {folder}, in which {table.layout.drawn} drawn "
                "tokens stand for the tail; take ad or kl at temperature 1, or make a table with --drawn 0"
            )
    return table


def open_table(table: Table, windows: Windows, masked: bool, vocab: int, directory: Path) -> Source:
    """The table as a teacher of a run in `directory`, which remembers its hash; refused where either is another."""
    table.check(windows, masked)
    if table.layout.vocab != vocab:
        raise InputError(
            f"table {table.folder} is of a vocabulary of {table.layout.vocab}, this run of {vocab}; "
            f"set model.vocab={table.layout.vocab}"
        )
    told, path = {"table": table.hash, **table.meta["teacher"]}, directory / "teacher.json"

    def remember() -> None:
        if path.exists() and (before := read_json(path)) != told:
            raise InputError(
                f"{directory} was begun with another teacher ({_named(before)}) than table {table.folder} holds now "
                f"({_named(told)}); bring that table back, or use another directory"
            )
        write_json(path, told)

    hosts.led(remember)
    return Source(Tabled(), None, lambda batches: TaughtBatches(batches, table))


def _named(told: dict[str, Any]) -> str:
    return f"run {told.get('run')} at step {told.get('step')}, table {told.get('table')}"


def rows_like(layout: Layout, batch: int, sharding: Callable[[int], Any]) -> Rows:
    """Shapes and types of the rows of a batch; `sharding` gives that of an array of so many axes."""
    shape = (batch, layout.window, layout.k)
    return Rows(
        jax.ShapeDtypeStruct(shape, layout.index, sharding=sharding(3)),
        jax.ShapeDtypeStruct(shape, layout.value, sharding=sharding(3)),
        jax.ShapeDtypeStruct(shape[:2], layout.value, sharding=sharding(2)),
    )
