"""The command `fbi teach`."""

from pathlib import Path
from typing import Annotated

import tyro

from fbi.errors import InputError

RunDirectory = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TEACHER_RUN")]
Student = Annotated[str, tyro.conf.arg(metavar="FILE_OR_RUN_DIR")]
Set = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="set", metavar="data.FIELD=VALUE")]


def teach(
    directory: RunDirectory,
    out: Path,
    k: int = 64,
    drawn: int | None = None,
    dtype: str = "float16",
    student: Student = "",
    assignments: Set = (),
    batch: int = 32,
    shard: int = 0,
    mesh: str = "",
    line_every: float = 10.0,
) -> None:
    """Write what a finished run says of the next token in every training window, once; students then learn from that.

    For example: fbi teach runs/teacher --out runs/teacher-64 --k 64
    Then: fbi train runs/student --set loss=ad --set teacher=runs/teacher-64 --set policy=fbi
    Interrupted, the same command continues. The order and number of epochs of a student do not matter.

    Args:
        directory: The run directory of the teacher.
        out: The folder of the table.
        k: Tokens kept at each position: the likeliest, and some drawn from the others.
        drawn: How many of the k are drawn (default: a quarter). They stand for the others, so that ad and kl at
            temperature 1 are taught without bias; with 0 the sum of the others is kept, for every loss over logits.
        dtype: Of log-probabilities, float16 or float32.
        student: Config or run directory whose data the table is of; empty: the teacher's own.
        assignments: Replaces a field of the data, such as data.window=256.
        batch: Windows computed at once, over all devices.
        shard: Windows in a file; 0: as many as make about 128 MiB.
        mesh: Axes and sizes, such as data=4,model=2; empty: every device on the data axis.
        line_every: Seconds between progress lines where standard output is not a terminal.
    """
    from fbi.experiment import overlay
    from fbi.files import read_json
    from fbi.train.rundir import parse_config, read_run
    from fbi.train.teach import Teaching, teach

    if other := [text for text in assignments if not text.startswith("data.")]:
        raise InputError(f"fbi teach takes fields of the data alone, as --set data.window=256, not {other[0]!r}")
    place = Path(student or directory)
    run = read_run(place) if place.is_dir() or not student else parse_config(read_json(place), str(place))
    teaching = Teaching(k=k, drawn=drawn, dtype=dtype, batch=batch, shard=shard, mesh=mesh, line_every=line_every)
    table = teach(directory, out, overlay(run, assignments).data, teaching)
    predictions = table.windows * table.layout.window
    size = sum(row["bytes"] for row in table.meta["shards"])
    draws = f" and {table.layout.drawn} drawn from the others" if table.layout.drawn else ""
    print(
        f"{out}: done, {table.windows:,} windows, {predictions:,} tokens, "
        f"the {k - table.layout.drawn} likeliest of {table.layout.vocab:,}{draws}; "
        f"{size / 1e6:,.1f} MB, {table.meta['bytes_per_token']:.1f} bytes/token "
        f"({table.layout.bytes_per_token} before compression), {len(table.meta['shards'])} file(s)"
    )
