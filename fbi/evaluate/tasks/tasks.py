"""The zero-shot tasks by name, and the score of a model on one of them."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from fbi.data.tokenizer import Tokenizer
from fbi.errors import InputError, unknown
from fbi.evaluate.tasks.metrics import TaskScore, last_word, multiple_choice
from fbi.evaluate.tasks.requests import Request, read_requests
from fbi.evaluate.tasks.score import Likelihood, Progress, log_likelihoods
from fbi.model.functional import Model, Params


def first_documents(requests: Sequence[Request], limit: int, seed: int) -> list[Request]:
    """The requests of the first `limit` documents; the seed does not matter."""
    del seed
    kept = set(sorted({request.doc for request in requests})[:limit])
    return [request for request in requests if request.doc in kept]


def drawn_documents(requests: Sequence[Request], limit: int, seed: int) -> list[Request]:
    """The requests of `limit` documents that `numpy.random.default_rng(seed)` draws."""
    documents = sorted({request.doc for request in requests})
    kept = {documents[i] for i in np.random.default_rng(seed).permutation(len(documents))[:limit]}
    return [request for request in requests if request.doc in kept]


@dataclasses.dataclass(frozen=True)
class Task:
    """A task: where its requests are, and how a part of it is taken and scored."""

    variant: str
    """Its folder in the package that `read_requests` reads."""
    summary: str
    """The data set, which part of it, and its source."""
    examples: bool = False
    """Whether the variant has worked examples, to be left out."""
    take: Callable[[Sequence[Request], int, int], list[Request]] = first_documents
    """requests, limit, seed -> the requests of at most `limit` documents"""
    score: Callable[[str, Sequence[Request], Sequence[Likelihood]], TaskScore] = multiple_choice

    def requests(self, limit: int | None = None, seed: int = 0) -> list[Request]:
        """Its requests: of all documents, or of at most `limit`."""
        everything = read_requests(self.variant, examples=self.examples)
        return everything if limit is None else self.take(everything, limit, seed)


TASKS = {
    "boolq": Task("boolq/rc_0shot", "BoolQ, validation: yes or no (Clark et al., arXiv 1905.10044)"),
    "piqa": Task("piqa/rc_0shot", "PIQA, validation: physical common sense (Bisk et al., arXiv 1911.11641)"),
    "hellaswag": Task("hellaswag/rc_0shot", "HellaSwag, validation: what follows (Zellers et al., arXiv 1905.07830)"),
    "winogrande": Task("winogrande/rc_0shot", "WinoGrande-XL, validation: who is meant (Sakaguchi et al., arXiv "
                       "1907.10641)"),
    "arc_easy": Task("arc_easy/rc_0shot", "ARC-Easy, validation: school science (Clark et al., arXiv 1803.05457)"),
    "arc_easy_test": Task("arc_easy/test_rc_5shot", "ARC-Easy, test", examples=True),
    "arc_challenge": Task("arc_challenge/rc_0shot", "ARC-Challenge, validation: its harder questions"),
    "arc_challenge_test": Task("arc_challenge/test_rc_5shot", "ARC-Challenge, test", examples=True),
    "openbookqa": Task("openbookqa/rc_0shot", "OpenBookQA, validation (Mihaylov et al., arXiv 1809.02789)"),
    "openbookqa_test": Task("openbookqa/test_rc_5shot", "OpenBookQA, test", examples=True),
    "lambada": Task("lambada/bpb_0shot", "LAMBADA (OpenAI's text), test: the last word (Paperno et al., arXiv "
                    "1606.06031)", take=drawn_documents, score=last_word),
}  # fmt: skip


def evaluate_task(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    name: str,
    *,
    limit: int | None = None,
    seed: int = 0,
    batch: int = 16,
    progress: Progress | None = None,
) -> TaskScore:
    """The zero-shot score of a model on the task `name`, one of `TASKS`, by log-likelihood of the answers.

    `limit`: at most so many documents; of multiple choice the first, of LAMBADA those that `seed` draws. `batch`
    answers are computed at once on the mesh in use; `progress(done, total)` counts answers. Of a context that is longer
    than the model's, the right end is kept. The data is downloaded the first time (86 MB). `InputError` for an unknown
    task, a limit below 1, and what `score_tokens` refuses.
    """
    task = find(name)
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; it must be at least 1, or None for all documents")
    requests = task.requests(limit, seed)
    texts = [(request.context, request.continuation) for request in requests]
    scores = log_likelihoods(model, params, tokenizer, texts, batch=batch, progress=progress)
    return task.score(name, requests, scores)


def find(name: str) -> Task:
    """The task of that name; an `InputError` that lists the names where there is none."""
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]
