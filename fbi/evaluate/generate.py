"""Text from a model: one compiled program that reads the prompts once and then adds a token at a time."""

import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from fbi.data.tokenizer import Tokenizer
from fbi.errors import InputError
from fbi.evaluate.mesh import rows_multiple
from fbi.model.attention import Cache
from fbi.model.axes import mesh_in_use
from fbi.model.functional import Model, Params

Kind = Literal["greedy", "free", "nucleus"]


def generate(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_at_separator: bool = True,
) -> str:
    """The text that the model adds to `prompt`: at most `tokens` tokens, or up to the end of the document.

    An empty prompt begins a document. `temperature` 0 takes the likeliest token each time; `top_p` draws from the
    fewest tokens that together have this probability (nucleus sampling, Holtzman et al., arXiv 1904.09751).
    """
    if tokenizer.vocab > model.config.vocab:
        raise InputError(f"the tokenizer has {tokenizer.vocab} tokens, the model {model.config.vocab}; they do not "
                         "belong together")  # fmt: skip
    added = complete(
        model,
        params,
        [tokenizer.encode(prompt) or [tokenizer.separator]],
        tokens=tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        separator=tokenizer.separator if stop_at_separator else None,
    )
    return tokenizer.decode(added[0])


def complete(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    separator: int | None = None,
) -> list[list[int]]:
    """The tokens added to each prompt: `tokens` of them, fewer where `separator` comes, which is left out.

    Prompts may differ in length: what a longer one has more than the shortest is read token by token. What a row
    draws depends on `seed`, its place and its prompt, not on the other rows.
    """
    _check(model, prompts, tokens, temperature, top_p)
    mesh = mesh_in_use()
    multiple = rows_multiple(mesh, model.axes.batch)
    rows = [*prompts, *[prompts[-1]] * (-len(prompts) % multiple)]
    lengths = np.array([len(row) for row in rows], np.int32)
    most = model.config.context
    room, head = _bucket(int(lengths.max()) + tokens, most), _bucket(int(lengths.min()), most)
    texts = np.zeros((len(rows), room), np.int32)
    for text, row in zip(texts, rows, strict=True):
        text[: len(row)] = row
    kind: Kind = "greedy" if temperature == 0 else "free" if top_p == 1 else "nucleus"
    with jax.set_mesh(mesh):
        choice = Choice(jax.random.key(seed), jnp.float32(temperature or 1.0), jnp.float32(top_p))
        filled, ends = _fill(
            model, head, kind, params, jnp.asarray(texts), jnp.asarray(lengths), jnp.asarray(lengths + tokens),
            jnp.int32(-1 if separator is None else separator), choice,
        )  # fmt: skip
        filled, ends = jax.device_get((filled, ends))
    return [filled[row, len(prompt) : ends[row]].tolist() for row, prompt in enumerate(prompts)]


def _check(model: Model, prompts: Sequence[Sequence[int]], tokens: int, temperature: float, top_p: float) -> None:
    """Refuses what cannot be generated, saying why."""
    if not prompts or not all(prompts):
        raise InputError("an empty prompt has nothing to go on; begin with the separator token")
    if tokens < 1:
        raise InputError(f"tokens is {tokens}; ask for at least 1")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"temperature is {temperature}; it must be 0 (the likeliest token) or a positive number")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}; it must be more than 0 and at most 1")
    longest, context, vocab = max(map(len, prompts)), model.config.context, model.config.vocab
    if longest + tokens > context:
        raise InputError(f"a prompt of {longest} tokens and {tokens} more pass the model's context of {context}; "
                         f"shorten the prompt or ask for at most {max(0, context - longest)}")  # fmt: skip
    if wrong := [token for prompt in prompts for token in prompt if not 0 <= token < vocab]:
        raise InputError(f"the prompt has token {wrong[0]}; the model knows 0 to {vocab - 1}")


def _bucket(length: int, most: int) -> int:
    """The next power of two from 16 on, so that prompts of many lengths share few programs."""
    return min(most, max(16, 1 << (length - 1).bit_length()))


class Choice(NamedTuple):
    """How a token is drawn: key, temperature, nucleus."""

    key: Key[Array, ""]
    temperature: Float[Array, ""]
    top_p: Float[Array, ""]


class _State(NamedTuple):
    """`texts` are known before `position`; `logits` are for the token at it; a row ends at `ends` once it is `done`."""

    position: Int[Array, ""]
    texts: Int[Array, "b s"]
    logits: Float[Array, "b v"]
    caches: dict[str, Cache]
    done: Bool[Array, " b"]
    ends: Int[Array, " b"]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _fill(
    model: Model,
    head: int,
    kind: Kind,
    params: Params,
    texts: Int[Array, "b s"],
    lengths: Int[Array, " b"],
    stops: Int[Array, " b"],
    separator: Int[Array, ""],
    choice: Choice,
) -> tuple[Int[Array, "b s"], Int[Array, " b"]]:
    """The prompts with what was added, and where each row ends.

    The first `head` places are read at once. Those beyond the shortest prompt leave wrong keys behind, which no query
    sees before the token of that place has overwritten them.
    """
    split, whole = jax.P(model.axes.batch, None), jax.P(None, None)
    start, (rows, room) = jnp.min(lengths), texts.shape

    def extend(tokens: Array, caches: dict[str, Cache], position: Array) -> tuple[Array, dict[str, Cache]]:
        return model.extend(params, jax.sharding.reshard(tokens, split), caches, position)

    logits, caches = extend(texts[:, :head], model.empty_cache(rows, room), jnp.int32(0))
    last = jax.lax.dynamic_index_in_dim(logits, start - 1, 1, keepdims=False)
    nothing = jnp.zeros(rows, bool)
    state = _State(start, texts, jax.sharding.reshard(last, whole), caches, nothing, stops)

    def step(state: _State) -> _State:
        position, texts = state.position, state.texts
        given = jax.lax.dynamic_index_in_dim(texts, position, 1, keepdims=False)
        free = position >= lengths
        token = jnp.where(free & ~state.done, pick(state.logits, position - lengths, choice, kind), given)
        texts = jax.lax.dynamic_update_index_in_dim(texts, token, position, 1)
        closed = free & ~state.done & (token == separator)
        ends = jnp.where(closed, position, state.ends)
        logits, caches = extend(token[:, None], state.caches, position)
        done = state.done | closed | (position + 1 >= stops)
        return _State(position + 1, texts, jax.sharding.reshard(logits[:, 0], whole), caches, done, ends)

    state = jax.lax.while_loop(lambda state: ~jnp.all(state.done), step, state)
    return state.texts, state.ends


def pick(logits: Float[Array, "b v"], index: Int[Array, " b"], choice: Choice, kind: Kind) -> Int[Array, " b"]:
    """A token for each row, the `index`-th that is added to it."""
    if kind == "greedy":
        return jnp.argmax(logits, -1).astype(jnp.int32)

    def draw(row: Array, index: Array, logits: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(choice.key, row), index)
        scaled = logits / choice.temperature.astype(logits.dtype)
        if kind == "free":
            return jax.random.categorical(key, scaled)
        order = jnp.argsort(scaled, descending=True)
        ranked = jax.nn.softmax(scaled[order])
        before = jnp.cumsum(ranked) - ranked  # the likeliest token has none before it: it always stays
        nucleus = jnp.where(before < choice.top_p, jnp.log(ranked), -jnp.inf)
        return order[jax.random.categorical(key, nucleus)]

    return jax.vmap(draw)(jnp.arange(len(logits)), index, logits).astype(jnp.int32)
