import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbi.model
from fbi.data.tokenizer import train_bpe
from fbi.errors import InputError
from fbi.evaluate.generate import Choice, complete, generate, pick
from fbi.model.axes import mesh_1x1

VOCAB, CONTEXT = 48, 64
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7]]


@functools.cache
def tiny(policy="fp", kv_heads=2, vocab=VOCAB):
    """A model whose logits are far enough apart that rounding does not decide, and its parameters."""
    shape = {"layers": 2, "dim": 32, "heads": 2, "head_dim": 8, "ff": 32, "context": CONTEXT}
    model = fbi.model.build("nano", policy, kv_heads=kv_heads, vocab=vocab, init_std=0.2, **shape)
    return model, model.init(0)


@functools.cache
def tokenizer():
    return train_bpe(["we shall keep the union strong"] * 3, 270)


def recomputed(model, params, prompt, count):
    """Greedy decoding without a cache."""
    tokens = list(prompt)
    with jax.set_mesh(mesh_1x1()):
        step = jax.jit(model.apply)
        for _ in range(count):
            padded = np.zeros((1, 32), np.int32)
            padded[0, : len(tokens)] = tokens
            tokens.append(int(jnp.argmax(step(params, jnp.asarray(padded))[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    ("policy", "kv_heads"),
    [("fp", 1), ("fbi", 2), ("bitnet-b158", 1), ("layers.0.*: w=none | layers.*: w=fbi", 2)],
)
def test_decoding_with_a_cache_equals_recomputing_everything(policy, kv_heads):
    model, params = tiny(policy, kv_heads)
    added = complete(model, params, PROMPTS, tokens=12)
    assert added == [recomputed(model, params, prompt, 12) for prompt in PROMPTS]
    assert len(set(added[0])) > 2  # not one token again and again, which anything would pass


def test_a_row_does_not_depend_on_its_neighbours():
    model, params = tiny()
    options = {"tokens": 8, "temperature": 1.0}
    assert complete(model, params, PROMPTS, **options)[0] == complete(model, params, PROMPTS[:1], **options)[0]


def test_every_mesh_adds_the_same_tokens():
    model, params = tiny()
    alone = complete(model, params, PROMPTS, tokens=8)
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "model"))):
        assert complete(model, model.init(0), PROMPTS, tokens=8) == alone


def test_a_seed_gives_the_same_tokens_and_another_seed_others():
    model, params = tiny()
    first, again, other = (
        complete(model, params, PROMPTS, tokens=10, temperature=1.5, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize("options", [{"temperature": 1.0, "top_p": 1e-6}, {"temperature": 1e-4}])
def test_a_tiny_nucleus_and_a_cold_draw_are_greedy(options):
    model, params = tiny()
    assert complete(model, params, PROMPTS, tokens=10, **options) == complete(model, params, PROMPTS, tokens=10)


def test_draws_follow_the_temperature_and_stay_in_the_nucleus():
    count = 4000
    logits = jnp.broadcast_to(jnp.log(jnp.array([[0.1, 0.5, 0.1, 0.3]])), (count, 4))
    index = jnp.zeros(count, jnp.int32)

    def shares(temperature, top_p, kind):
        choice = Choice(jax.random.key(0), jnp.float32(temperature), jnp.float32(top_p))
        return np.bincount(pick(logits, index, choice, kind), minlength=4) / count

    np.testing.assert_allclose(shares(1.0, 1.0, "free"), [0.1, 0.5, 0.1, 0.3], atol=0.03)
    hot = np.array([0.1, 0.5, 0.1, 0.3]) ** 0.5
    np.testing.assert_allclose(shares(2.0, 1.0, "free"), hot / hot.sum(), atol=0.03)
    np.testing.assert_allclose(shares(1.0, 0.7, "nucleus"), [0, 0.625, 0, 0.375], atol=0.03)
    np.testing.assert_allclose(shares(1.0, 0.45, "nucleus"), [0, 1, 0, 0])


def test_a_row_stops_before_the_separator():
    model, params = tiny()
    added = complete(model, params, PROMPTS, tokens=12)
    separator = added[0][4]
    stopped = complete(model, params, PROMPTS, tokens=12, separator=separator)
    for row, full in zip(stopped, added, strict=True):
        assert row == full[: full.index(separator) if separator in full else None]


def test_text_continues_a_prompt_and_an_empty_one_begins_a_document():
    words = tokenizer()
    model, params = tiny(vocab=words.vocab + 2)  # a model may have rows to spare
    ids = words.encode("we shall")
    added = complete(model, params, [ids], tokens=6)[0]
    options = {"tokens": 6, "stop_at_separator": False}
    assert generate(model, params, words, "we shall", **options) == words.decode(added)
    begun = complete(model, params, [[words.separator]], tokens=6)[0]
    assert generate(model, params, words, "", **options) == words.decode(begun)


def test_the_context_can_be_filled_to_its_end():
    model, params = tiny()
    assert len(complete(model, params, [[1] * 5], tokens=CONTEXT - 5)[0]) == CONTEXT - 5


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokens": CONTEXT}, "ask for at most 55"),
        ({"tokens": 0}, "tokens is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"prompts": [[]]}, "empty prompt"),
        ({"prompts": [[VOCAB]]}, f"token {VOCAB}"),
    ],
)
def test_what_cannot_be_generated_is_refused(changes, says):
    model, params = tiny()
    options = {"prompts": PROMPTS, "tokens": 4} | changes
    with pytest.raises(InputError, match=says):
        complete(model, params, **options)


def test_a_tokenizer_of_another_model_is_refused():
    model, params = tiny()
    with pytest.raises(InputError, match="do not belong together"):
        generate(model, params, tokenizer(), "we", tokens=2)
