"""Terms over logits: next-token cross-entropy, autoregressive distillation, Kullback-Leibler divergences.

Every term is per position, in nats. The vocabulary axis may be split over devices: nothing here gathers along it.
T is the teacher, S the student; no gradient flows to the teacher.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fbi.loss.outputs import Outputs


def log_normalizer(logits: Float[Array, "b t v"]) -> Float[Array, "b t"]:
    """log sum exp over the vocabulary."""
    return jax.nn.logsumexp(logits, axis=-1)


def cross_entropy(logits: Float[Array, "b t v"], labels: Int[Array, "b t"]) -> Float[Array, "b t"]:
    """-log softmax(logits)[label] in nats, per position."""
    # A comparison instead of a gather: the vocabulary axis may be split over devices.
    vocabulary = jnp.arange(logits.shape[-1])[None, None, :]
    label_logit = jnp.sum(jnp.where(vocabulary == labels[..., None], logits, 0), -1)
    return log_normalizer(logits) - label_logit


def _own(out: Outputs) -> Float[Array, "b t v"]:
    """The student's logits."""
    assert out.logits is not None  # only terms over features are given none
    return out.logits


def next_token(out: Outputs) -> Float[Array, "b t"]:
    """Cross-entropy of the next token in nats, per position: -log softmax(logits)[label]."""
    return cross_entropy(_own(out), out.labels)


def _taught(out: Outputs) -> Float[Array, "b t v"]:
    """The teacher's logits, as constants."""
    assert out.teacher_logits is not None  # Loss refuses such a call in words
    return jax.lax.stop_gradient(out.teacher_logits)


def _likeliest(logits: Float[Array, "b t v"], top_k: int) -> Float[Array, "b t v"]:
    """The `top_k` largest logits of each position, the others -inf (0, or as many as there are: all)."""
    if not 0 < top_k < logits.shape[-1]:
        return logits
    *rows, vocabulary = jax.typeof(logits).sharding.spec
    whole = logits if vocabulary is None else jax.sharding.reshard(logits, jax.P(*rows, None))
    return jnp.where(logits >= jax.lax.top_k(whole, top_k)[0][..., -1:], logits, -jnp.inf)


def distillation(out: Outputs, *, temperature: float = 1.0, top_k: int = 0) -> Float[Array, "b t"]:
    """Soft cross-entropy to the teacher in nats, per position: -sum_v p_T(v) log p_S(v).

    FBI-LLM, arXiv 2407.07093, section 3.2: temperature 1, whole vocabulary, no label term. At another temperature both
    sides are softened and the loss is multiplied by its square (Hinton et al., arXiv 1503.02531, section 2).
    `top_k` keeps the teacher's likeliest tokens, renormalised (0: all). Its floor is the teacher's entropy, not zero.
    """
    target = jax.nn.softmax(_likeliest(_taught(out) / temperature, top_k), axis=-1)
    logits = _own(out) / temperature
    return temperature**2 * (log_normalizer(logits) - jnp.sum(target * logits, -1))


def teacher_entropy(out: Outputs) -> Float[Array, "b t"]:
    """Entropy of the teacher's next-token distribution in nats: the floor of distillation at temperature 1."""
    logits = _taught(out)
    return log_normalizer(logits) - jnp.sum(jax.nn.softmax(logits, -1) * logits, -1)


def _divergence(p: Float[Array, "b t v"], q: Float[Array, "b t v"], temperature: float) -> Float[Array, "b t"]:
    """temperature² KL(p || q) of the softened distributions with these logits, in nats."""
    log_p, log_q = (jax.nn.log_softmax(logits / temperature, axis=-1) for logits in (p, q))
    return temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)


def forward_kl(out: Outputs, *, temperature: float = 1.0) -> Float[Array, "b t"]:
    """KL(T || S) = sum_v p_T(v) log(p_T(v) / p_S(v)) in nats, per position; times temperature² when softened.

    `distillation` less the teacher's entropy: the same gradient, and zero where student and teacher agree.
    """
    return _divergence(_taught(out), _own(out), temperature)


def reverse_kl(out: Outputs, *, temperature: float = 1.0) -> Float[Array, "b t"]:
    """KL(S || T) = sum_v p_S(v) log(p_S(v) / p_T(v)) in nats, per position; times temperature² when softened.

    It seeks a mode of the teacher instead of covering all of it; MiniLLM, arXiv 2306.08543, here per token of
    the text.
    """
    return _divergence(_own(out), _taught(out), temperature)


def confidence_aware_kl(out: Outputs, *, temperature: float = 1.0, beta: float | None = None) -> Float[Array, "b t"]:
    """beta KL(S || T) + (1 - beta) KL(T || S) in nats, per position; BitDistiller's CAKLD, arXiv 2402.10631.

    beta is how sure the teacher is of the text: the mean over the batch of its probability of each label, a constant to
    the gradient. The authors measure it once, over their training data, before training: `beta` sets such a number.
    """
    weight = jnp.mean(jnp.exp(-cross_entropy(_taught(out), out.labels))) if beta is None else beta
    return weight * reverse_kl(out, temperature=temperature) + (1 - weight) * forward_kl(out, temperature=temperature)
