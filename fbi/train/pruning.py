"""What pruning, predictors and a fixed number of experts add to a run: checks, and the share of zeros in the record."""

from collections.abc import Callable

import jax

from fbi.errors import InputError
from fbi.loss import Loss
from fbi.model import Params
from fbi.model.pruning import Pruning, zero_share
from fbi.policy import Policy
from fbi.train.run import Run

PREDICTION = "prediction"


def check(run: Run, loss: Loss) -> None:
    """Refuses pruning, prediction and top-k where they cannot be."""
    model = run.model
    if PREDICTION in {term.kind for term in loss.terms} and not (model.expert and model.routing == "dense"):
        raise InputError(
            f"loss={run.loss!r}: prediction trains routers beside a model that uses all experts, not model.expert="
            f"{model.expert}, routing={model.routing}; use model.expert=32 with model.routing=dense"
        )
    if run.sparsity and model.top_k:
        raise InputError(
            f"model.top_k={model.top_k} fixes the sparsity at {1 - model.top_k / model.experts:g}, and "
            f"sparsity={run.sparsity} asks for one; drop one of them"
        )
    if run.pruning:
        _check_pruning(run)


def _check_pruning(run: Run) -> None:
    pruning = Pruning.parse(run.pruning)
    if not run.start:
        raise InputError(f"pruning={run.pruning!r} needs trained weights, and start='' has none; set start")
    if run.model.expert:
        raise InputError(
            f"pruning={run.pruning!r} takes weights away for good, and model.expert={run.model.expert} lets "
            "every token choose; use model.expert=0, the experts of a pattern are named in it"
        )
    if run.optimizer.freeze != "zeros":
        raise InputError(
            f"pruning={run.pruning!r}: with optimizer.freeze={run.optimizer.freeze!r} the first step brings pruned "
            "weights back; set optimizer.freeze=zeros"
        )
    pruning.check(run.model, Policy.parse(run.policy))


def told(run: Run) -> Callable[[Params], dict[str, float]]:
    """What a row of an evaluation says of a pruned model: `sparsity`, the share of the MLPs' weights that are zero."""
    if run.optimizer.freeze != "zeros":
        return lambda params: {}
    share = jax.jit(zero_share)
    return lambda params: {"sparsity": float(share(params))}
