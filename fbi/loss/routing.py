"""LTE's two terms over the scores of routers: arXiv 2402.06126, section 4.2. No teacher has a part in them."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from fbi.loss.outputs import Outputs

SCORES = "mlp.router"  # [layers, b, t, experts], in (0, 1)


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
