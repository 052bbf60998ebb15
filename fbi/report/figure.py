"""What every picture shares: size, colours, and a file that is whole or absent."""

import io
import os
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from fbi.errors import InputError
from fbi.files import make_directory

# Okabe and Ito's colours, told apart with any colour vision; markers differ as well
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#555555"
SUFFIXES = {".png": {"Software": None}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: str | os.PathLike[str]) -> Figure:
    """Writes the picture whole or not at all."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"a picture cannot be {path.name!r}; end its name in one of {', '.join(SUFFIXES)}")
    out = io.BytesIO()
    with matplotlib.rc_context({"pdf.fonttype": 42, "svg.hashsalt": "fbi"}):  # text stays text; equal runs, equal files
        suffix = path.suffix.lower()
        figure.savefig(out, format=suffix[1:], dpi=160, metadata=SUFFIXES[suffix])
    make_directory(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(out.getvalue())
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another place") from error
    finally:
        temporary.unlink(missing_ok=True)
    return figure


def style(index: int) -> tuple[str, str]:
    """Colour and marker; no pair comes twice in 49."""
    turn, place = divmod(index, len(COLOURS))
    return COLOURS[place], MARKERS[(place + turn) % len(MARKERS)]


def short(text: str, length: int) -> str:
    """`text`, cut to a length."""
    return text if len(text) <= length else f"{text[: length - 1]}…"
