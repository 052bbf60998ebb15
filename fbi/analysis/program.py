"""What a compiled program moves between devices, read off its text."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

WIDTHS = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2}  # bytes; of the others the name tells
_OPERATION = re.compile(r" = (?P<type>\([^=]*?\)|\S+) all-gather(?P<start>-start)?\(")
_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d+(?:e\d+m\d+\w*)?|pred)\[(?P<shape>[\d,]*)\]")


class Gathered(NamedTuple):
    """The result of an all-gather on one device."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size."""
        bits = re.match(r"[a-z]+(\d+)", self.dtype)
        width = WIDTHS.get(self.dtype) or (int(bits[1]) / 8 if bits else 1)
        return math.ceil(width * math.prod(self.shape))


def all_gathers(text: str) -> Iterator[Gathered]:
    """Every all-gather of a program, as `compiled.as_text()` gives it; one inside a loop stands there once."""
    for found in _OPERATION.finditer(text):
        arrays = [
            Gathered(a["dtype"], tuple(map(int, filter(None, a["shape"].split(",")))))
            for a in _ARRAY.finditer(found["type"])
        ]
        # An asynchronous one gives its operands first, then as many results.
        yield from arrays[len(arrays) // 2 :] if found["start"] else arrays
