"""Our models for EleutherAI's evaluation harness: `lm_eval.simple_evaluate(model=FbiLM(*fbi.load(RUN_DIR)), ...)`.

The harness brings many tasks and many packages: `pip install 'fbi[eval]'`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from fbi.data.tokenizer import Tokenizer
from fbi.errors import InputError
from fbi.evaluate.generate import complete
from fbi.evaluate.tasks.score import log_likelihoods, score_tokens
from fbi.model.functional import Model, Params

try:
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
        get_rolling_token_windows,
        make_disjoint_window,
    )
except ImportError as error:
    raise InputError(f"lm-eval cannot be imported ({error}); install it with: pip install 'fbi[eval]'") from error

_MOST_NEW = 256  # tokens added where a task does not say how many: the harness' own default
_MOST_NEW_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first counts


class Sampling(NamedTuple):
    """How a generation task wants its text; see `sampling`."""

    until: tuple[str, ...]
    tokens: int
    temperature: float
    top_p: float


def sampling(options: dict[str, Any]) -> Sampling:
    """A task's `generation_kwargs`: greedy unless `do_sample` is true, or a temperature above 0 comes without it."""
    until = options.get("until") or ()
    sample = options.get("do_sample", options.get("temperature", 0) > 0)
    return Sampling(
        (until,) if isinstance(until, str) else tuple(until),
        int(next((options[name] for name in _MOST_NEW_NAMES if options.get(name)), _MOST_NEW)),
        float(options.get("temperature", 1.0)) if sample else 0.0,
        float(options.get("top_p", 1.0)) if sample else 1.0,
    )


class FbiLM(LM):
    """A model, its parameters and its tokenizer as the harness' interface; `batch` requests are computed at once.

    Requests of the harness hold their arguments as `request.args`. Contexts longer than the model's keep their right
    end. A process computes all requests, on the mesh in use.
    """

    def __init__(self, model: Model, params: Params, tokenizer: Tokenizer, *, batch: int = 16, seed: int = 0):
        super().__init__()
        self.model, self.params, self.tokenizer, self.batch, self.seed = model, params, tokenizer, batch, seed

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(ln p(continuation | context), whether greedy decoding gives it) of requests (context, continuation).

        Spaces at the end of a context belong to the continuation, as in the harness' own models; then both are encoded
        on their own.
        """
        texts = [_spaces_moved(*request.args) for request in requests]
        scores = log_likelihoods(self.model, self.params, self.tokenizer, texts, batch=self.batch)
        return [(score.log_p, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """ln p(text) of requests (text,), after the separator token; every token is scored once.

        A text longer than the model's context is cut as the harness prescribes: windows side by side, the last of them
        as long as the others, with only its new tokens scored.
        """
        length, start = self.model.config.context, self.tokenizer.separator
        owners, pairs = [], []
        for owner, request in enumerate(requests):
            ids = self.tokenizer.encode(request.args[0])
            for window in get_rolling_token_windows(ids, prefix_token=start, max_seq_len=length, context_len=1):
                owners.append(owner)
                pairs.append(make_disjoint_window(window))
        totals = [0.0] * len(requests)
        scores = score_tokens(self.model, self.params, pairs, batch=self.batch)
        for owner, score in zip(owners, scores, strict=True):
            totals[owner] += score.log_p
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The text added to requests (context, generation_kwargs), up to the first of `until`, which is left out.

        A row is computed up to `max_gen_toks` tokens (256 unless told) or the separator; stop texts cut it afterwards.
        `InputError` where the tokens asked for leave no room for a context.
        """
        groups: dict[Sampling, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(sampling(request.args[1]), []).append(index)
        found = [""] * len(requests)
        for wanted, indices in groups.items():
            room = self.model.config.context - wanted.tokens
            if room < 1:
                raise InputError(
                    f"max_gen_toks={wanted.tokens} leaves no room in the model's context of "
                    f"{self.model.config.context}; ask for at most {self.model.config.context - 1}"
                )
            encoded = {i: self.tokenizer.encode(requests[i].args[0]) for i in indices}
            prompts = {i: (ids or [self.tokenizer.separator])[-room:] for i, ids in encoded.items()}
            # Prompts of like length together: what one has more than the shortest is read token by token.
            order = sorted(indices, key=lambda i: len(prompts[i]))
            for start in range(0, len(order), self.batch):
                part = order[start : start + self.batch]
                added = complete(
                    self.model,
                    self.params,
                    [prompts[i] for i in part],
                    tokens=wanted.tokens,
                    temperature=wanted.temperature,
                    top_p=wanted.top_p,
                    seed=self.seed + start,
                    separator=self.tokenizer.separator,
                )
                for i, ids in zip(part, added, strict=True):
                    found[i] = _cut(self.tokenizer.decode(ids), wanted.until)
        return found


def _spaces_moved(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of the stop texts."""
    ends = [end for stop in until if stop and (end := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]
