"""From log-likelihoods to what is reported: accuracies with standard errors, perplexity, bits per byte."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from fbi.evaluate.tasks.requests import Request
from fbi.evaluate.tasks.score import Likelihood


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """What a model reached on a task; an accuracy is nan where a log-likelihood is."""

    name: str
    documents: int
    accuracy: float
    """Share of documents whose right answer has the highest log-likelihood; of LAMBADA, whose last word is the one that
    greedy decoding gives."""
    bits_per_byte: float
    """Bits per byte of the right answers, their leading space included: it tells models apart that guess."""
    accuracy_norm: float | None = None
    """As `accuracy`, by log-likelihood per character of the answer without its leading space; None for LAMBADA."""
    perplexity: float | None = None
    """exp(-mean ln p(last word)) of LAMBADA, per word; None for multiple choice."""
    chance: float | None = None
    """The expected accuracy of guessing; None for LAMBADA."""

    @property
    def stderr(self) -> float:
        """Standard error of `accuracy`: sqrt(p (1 - p) / n)."""
        return _stderr(self.accuracy, self.documents)

    @property
    def stderr_norm(self) -> float | None:
        """Standard error of `accuracy_norm`."""
        return None if self.accuracy_norm is None else _stderr(self.accuracy_norm, self.documents)


def _stderr(share: float, count: int) -> float:
    return math.sqrt(share * (1 - share) / count)


def multiple_choice(name: str, requests: Sequence[Request], scores: Sequence[Likelihood]) -> TaskScore:
    """Each document's answer is the one of the highest log-likelihood, the first of equals.

    `accuracy_norm` divides by the characters of the answer without its leading space (by 1 at least), as OLMES does
    (Gu et al., arXiv 2406.08446).
    """
    documents: dict[int, list[tuple[Request, float]]] = {}
    for request, score in zip(requests, scores, strict=True):
        documents.setdefault(request.doc, []).append((request, score.log_p))
    plain, normalized, right_nats, right_bytes = 0, 0, 0.0, 0
    for answers in documents.values():
        log_p = np.array([value for _, value in answers])
        lengths = np.array([max(1, len(request.continuation.removeprefix(" "))) for request, _ in answers])
        right = answers[0][0].label
        plain += int(np.argmax(log_p)) == right
        normalized += int(np.argmax(log_p / lengths)) == right
        right_nats -= float(log_p[right])
        right_bytes += len(answers[right][0].continuation.encode())
    count, broken = len(documents), any(math.isnan(score.log_p) for score in scores)
    return TaskScore(
        name,
        count,
        math.nan if broken else plain / count,
        right_nats / math.log(2) / right_bytes,
        accuracy_norm=math.nan if broken else normalized / count,
        chance=sum(1 / len(answers) for answers in documents.values()) / count,
    )


def last_word(name: str, requests: Sequence[Request], scores: Sequence[Likelihood]) -> TaskScore:
    """LAMBADA (Paperno et al., arXiv 1606.06031): is the last word, given all before it, what greedy decoding gives?"""
    nats, count = -sum(score.log_p for score in scores), len(scores)
    text = sum(len(request.continuation.encode()) for request in requests)
    mean = nats / count
    return TaskScore(
        name,
        count,
        math.nan if math.isnan(nats) else sum(score.greedy for score in scores) / count,
        nats / math.log(2) / text,
        perplexity=math.exp(mean) if mean < 700 else math.nan if math.isnan(mean) else math.inf,
    )
