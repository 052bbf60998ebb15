"""Which document is trained on and which is held out: a function of the document alone."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator

SPLITS = ("train", "validation", "test")

# Years of the first speech of a split: 92% of the bytes, then 4.5%, then 3.5%. Later than all that is trained on.
VALIDATION_FROM = 1997
TEST_FROM = 2014


def by_year(year: int) -> str:
    """The split of a State of the Union address."""
    return "train" if year < VALIDATION_FROM else "validation" if year < TEST_FROM else "test"


def by_text(text: str, validation: float, test: float) -> int:
    """The index in `SPLITS` of a document, from the SHA-256 of its text.

    Adding, moving or renaming documents moves no other, and copies of a document never part.
    """
    place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
    return 1 if place < validation else 2 if place < validation + test else 0


def assign(texts: Iterable[str], validation: float, test: float) -> tuple[bytearray, list[int]]:
    """The split of each document, and where (in characters) a corpus of one document is cut, so that it has splits.

    A corpus of one document cannot hold any out whole: it is cut near ends of lines into train, validation and test,
    in that order, and the answer is that of the pieces.
    """
    assigned, first = bytearray(), ""
    for text in texts:
        first = "" if assigned else text
        assigned.append(by_text(text, validation, test))
    if len(assigned) != 1:
        return assigned, []
    cuts = []
    for share in (validation + test, test):
        place = round(len(first) * (1 - share))
        cuts.append(first.rfind("\n", cuts[-1] if cuts else 0, place) + 1 or place)
    pieces = [0, *cuts, len(first)]
    return bytearray(i for i in range(3) if pieces[i + 1] > pieces[i]), cuts


def cut(texts: Iterable[str], cuts: list[int]) -> Iterator[str]:
    """The documents, or the pieces of the only one where `cuts` has places."""
    if not cuts:
        yield from texts
        return
    for text in texts:
        places = [0, *cuts, len(text)]
        yield from (text[a:b] for a, b in itertools.pairwise(places) if b > a)
