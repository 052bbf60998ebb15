"""Terms over the scores of routers: LTE's two, arXiv 2402.06126, section 4.2, and Deja Vu's. None has a teacher."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from fbi.loss.outputs import Outputs
from fbi.model.router import magnitude
from fbi.quant.select import kth_largest

SCORES = "mlp.router"  # [layers, b, t, experts], in (0, 1)
LOGITS = f"{SCORES}.logits"
UNITS = "mlp.down"  # the hidden units, [layers, b, t, ff]


def efficiency(out: Outputs) -> Float[Array, "b t"]:
    """The mean over layers and experts of G², per position: LTE's L_eff, which its weight eta trades for quality.

    The paper's text calls it the mean of the scores; its formula, which is this one, squares them.
    """
    return jnp.mean(jnp.square(out.features[SCORES]), (0, -1))


def separability(out: Outputs, *, tau: float = 0.5, floor: float = 0.01) -> Float[Array, "b t"]:
    """The mean over layers and experts of 1 / max((G - tau)², floor), per position: LTE's L_sep.

    It keeps scores away from the threshold tau at which they are cut. The paper has no floor: its term is singular at
    tau, and its mean over scores of any smooth density diverges. With one, it is at most 1 / floor, and scores nearer
    to tau than sqrt(floor) get no gradient. The paper weighs it by 0.5, for runs of epochs.
    """
    return jnp.mean(1 / jnp.maximum(jnp.square(out.features[SCORES] - tau), floor), (0, -1))


def prediction(out: Outputs, *, sparsity: float = 0.5) -> Float[Array, "b t"]:
    """The mean over layers and experts of the binary cross-entropy of the logits with what they predict, per position.

    The label of an expert is 1 where sum_j |h_j| over its neurons is among the largest 1 - sparsity of the layer.
    Deja Vu, arXiv 2310.17157, section 4.1: its labels are the neurons that a ReLU leaves above 0, which SwiGLU has
    not; its code weighs positive labels more where there are few. The model must run dense, so that the hidden units
    are all there; no gradient of this term reaches it.
    """
    logits = out.features[LOGITS]
    experts = logits.shape[-1]
    size = magnitude(out.features[UNITS], experts)
    least = kth_largest(size, max(round((1 - sparsity) * experts), 1), -1)
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, (size >= least).astype(logits.dtype)), (0, -1))
