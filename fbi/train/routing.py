"""What a routed model adds to a run: checks, numbers in the record, a requested sparsity.

LTE (Learn To be Efficient, arXiv 2402.06126) as two runs. Stage 1: `start` names a dense run, model.expert=32, loss
`ce + 0.5*efficiency + 0.02*separability`. Stage 2: `start` names stage 1, model.routing=hard, loss `ce`. In the paper
the routers of stage 2 stay as they are; there a requested sparsity still moves their biases, by one common amount.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from fbi.analysis.routing import FEATURE, WATCH, routing_tallies
from fbi.data import Windows
from fbi.errors import InputError
from fbi.evaluate.perplexity import NO_TALLY, Tally
from fbi.loss import NO_WATCH, SCORES, Loss, Watch
from fbi.model import Model, Params
from fbi.model.config import ModelConfig
from fbi.train.control import NO_CONTROL, Control, bias_control, shifted, sparsity_control
from fbi.train.loop import Finish
from fbi.train.mesh import local_rows, put_batch
from fbi.train.run import Run
from fbi.train.step import State, documents_of

EFFICIENCY = "efficiency"
TOKENS = 32_768  # of held-out text, at least where there are as many, on which the requested sparsity is met exactly

Held = Callable[[int], Sequence[Int[Array, "b t"]]]  # batches of validation windows, at least so many tokens or all


class Parts(NamedTuple):
    """What a run puts into step, evaluation and loop; nothing for a dense model."""

    watch: Watch = NO_WATCH
    tally: Tally = NO_TALLY
    control: Control = NO_CONTROL
    finish: Finish = lambda state, step: (state, [])


def check(run: Run, loss: Loss) -> None:
    """Refuses what routers, losses over their scores, and a requested sparsity cannot be together."""
    model, trained = run.model, run.model.expert and run.model.routing == "soft"
    used = run.model.expert and run.model.routing != "dense"
    if (over := [term.kind for term in loss.terms if FEATURE in term.registered.features({})]) and not trained:
        raise InputError(
            f"loss={run.loss!r}: {', '.join(over)} trains routers, which model.expert={model.expert}, "
            f"routing={model.routing} does not; drop it, or use model.expert=32 with model.routing=soft"
        )
    if model.routing == "hard" and not run.start:
        raise InputError(
            "model.routing=hard freezes the routers, and start='' has none that were trained; set start to a run with "
            "model.routing=soft (LTE's stage 1)"
        )
    if run.grouping != "kmeans" and not (model.expert and run.start):
        raise InputError(
            f"grouping={run.grouping} makes experts of the neurons of a dense start, and there is none here "
            f"(model.expert={model.expert}, start={run.start!r}); leave it at kmeans"
        )
    if not run.sparsity:
        return
    if not 0 < run.sparsity < 1:
        raise InputError(f"sparsity={run.sparsity} must be above 0 and below 1, or 0 for a fixed weight of efficiency")
    if not used:
        raise InputError(
            f"sparsity={run.sparsity} needs routers, and model.expert={model.expert}, routing={model.routing} uses "
            "none; set model.expert=32 and model.routing=soft, or sparsity=0"
        )
    weights = [term.weight for term in loss.terms if term.kind == EFFICIENCY]
    if trained and not (len(weights) == 1 and weights[0] > 0):
        raise InputError(
            f"sparsity={run.sparsity} moves the weight of efficiency, and loss={run.loss!r} has not one such term of "
            "positive weight; use for example 'ce + 0.5*efficiency + 0.02*separability'"
        )


def tally_of(model: ModelConfig) -> Tally:
    """What an evaluation sums up of a model's routers; nothing for a dense one."""
    return Tally((FEATURE,), routing_tallies) if model.expert else NO_TALLY


def parts(run: Run, loss: Loss, model: Model, held: Held, separator: int | None) -> Parts:
    """What the model and the requested sparsity of a run ask for; `held` gives text that it does not train on."""
    if not run.model.expert:
        return Parts()
    found = Parts(WATCH, tally_of(run.model))
    if not run.sparsity:
        return found
    starts = [term.weight for term in loss.terms if term.kind == EFFICIENCY]
    control = sparsity_control(run.sparsity, starts[0]) if starts else bias_control(run.sparsity)

    def finish(state: State, step: int) -> tuple[State, list[dict[str, Any]]]:
        params, told = meet(model, state["params"], held(TOKENS), run.sparsity, separator)
        return {**state, "params": params}, [{"kind": "calibration", "step": step, **told}]

    return found._replace(control=control, finish=finish)


def held(windows: Windows, batch: int, mesh: jax.sharding.Mesh, tokens: int) -> list[Int[Array, "b t"]]:
    """Inputs [batch, window] from all over the validation split, about so many tokens or as many as it has."""
    there = windows.count("validation")
    count = max(1, min(-(-tokens // windows.window), there) // batch)
    places = np.linspace(0, there - 1, count * batch).astype(int).reshape(count, batch)
    mine = places[:, local_rows(batch, mesh)]
    rows = [np.stack([windows.read("validation", int(place)) for place in part]) for part in mine]
    return [put_batch(part[:, :-1], mesh, batch) for part in rows]


def meet(
    model: Model, params: Params, batches: Sequence[Int[Array, "b t"]], sparsity: float, separator: int | None = None
) -> tuple[Params, dict[str, Any]]:
    """Parameters whose routers leave out that share of experts on these batches, and what was done.

    One number is taken from the bias of every router: the quantile, over layers, experts and tokens, of the logits. The
    threshold of the scores stays 0.5.
    """

    @jax.jit
    def logits(params: Params, tokens: Array) -> Array:
        found = model.features(params, tokens, documents_of(tokens, separator), wanted=(FEATURE,))[1][SCORES]
        whole = jax.sharding.reshard(found, jax.P(*[None] * 4))
        return jnp.log(whole) - jnp.log1p(-whole)

    values = np.concatenate([np.asarray(jax.device_get(logits(params, tokens))).ravel() for tokens in batches])
    shift = float(np.quantile(values, sparsity))

    told = {"shift": shift, "sparsity": float(np.mean(values <= 0)), "requested": sparsity, "scores": values.size}
    return shifted(params, shift), told
