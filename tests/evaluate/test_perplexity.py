import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbi.model
from fbi.errors import InputError
from fbi.evaluate import perplexity
from fbi.evaluate.perplexity import Score, evaluate, spans
from fbi.model.axes import mesh_1x1

VOCAB, SEPARATOR = 24, 0
BYTES = np.arange(VOCAB, dtype=np.int32) % 4  # the separator has none


def tiny(policy="fp", **changes):
    shape = {"layers": 1, "dim": 16, "heads": 2, "kv_heads": 2, "head_dim": 8, "ff": 16, "vocab": VOCAB, "context": 32}
    return fbi.model.build("nano", policy, **(shape | changes))


def stream(length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, length).astype(np.int32)


def score(model, params, tokens, **changes):
    options = {"token_bytes": BYTES, "window": 9, "stride": 8, "batch": 4} | changes
    return evaluate(model, params, tokens, **options)


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def params(model):
    return model.init(0)


@pytest.mark.parametrize(("length", "window", "stride"), [(41, 9, 8), (41, 9, 4), (30, 9, 3), (9, 9, 1), (33, 2, 1)])
def test_overlapping_windows_score_every_token_but_the_first_once(length, window, stride):
    scored = [start + 1 + p for start, first in spans(length, window, stride) for p in range(first, window - 1)]
    assert sorted(scored) == list(range(1, 1 + len(scored)))
    assert length - len(scored) <= stride  # what is left fills no stride


@pytest.mark.parametrize("stride", [9, 12])
def test_disjoint_windows_score_all_their_predictions(stride):
    assert spans(45, 9, stride) == [(start, 0) for start in range(0, 37, stride)]


def test_uniform_logits_give_the_logarithm_of_the_vocabulary(model, params):
    flat = params | {"head": jax.tree.map(jnp.zeros_like, params["head"])}
    found = score(model, flat, stream(41))
    assert found.loss == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert found.perplexity == pytest.approx(VOCAB, rel=1e-5)


def test_a_score_is_the_sum_over_the_scored_tokens(model, params):
    tokens = stream(50)
    found = score(model, params, tokens)
    logits = model.apply(params, jnp.asarray(tokens[:48].reshape(6, 8)))  # 6 windows, each beginning anew
    log_p = jax.nn.log_softmax(logits).reshape(48, VOCAB)
    nats = -float(sum(log_p[i, tokens[i + 1]] for i in range(48)))
    assert found.nats == pytest.approx(nats, rel=1e-6)
    assert (found.tokens, found.windows, found.bytes) == (48, 6, BYTES[tokens[1:49]].sum())
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / found.bytes)


def test_disjoint_windows_give_the_exponential_of_the_mean_over_windows(model, params):
    tokens = stream(50)
    each = [score(model, params, tokens[i : i + 9]).loss for i in range(0, 45, 9)]
    found = score(model, params, tokens, stride=9)
    assert (found.windows, found.tokens) == (5, 40)
    assert found.perplexity == pytest.approx(math.exp(np.mean(each)), rel=1e-6)


def test_a_later_window_sees_what_it_does_not_score(model, params):
    tokens, other = stream(13), stream(13)
    other[4] = (other[4] + 1) % VOCAB
    overlap = [score(model, params, t, stride=4).nats - score(model, params, t, limit=1).nats for t in (tokens, other)]
    assert score(model, params, tokens, stride=4).tokens == 12
    assert abs(overlap[0] - overlap[1]) > 1e-6


def test_the_batch_size_changes_nothing(x64):
    model = tiny("fbi", dtype="float64")
    params = model.init(0)
    scores = [
        score(model, params, stream(60), batch=batch) for batch in (1, 3)
    ]  # 7 windows: the last batch is part empty
    assert scores[1].nats == pytest.approx(scores[0].nats, rel=1e-14)
    counts = [(score.tokens, score.bytes, score.windows) for score in scores]
    assert counts[0] == counts[1] == (56, int(BYTES[stream(60)[1:57]].sum()), 7)


def test_what_fills_the_last_batch_cannot_spoil_the_sum(model, params):
    table = np.array(params["embed"])
    table[0] = np.nan  # rows that fill the batch are made of token 0
    broken = params | {"embed": jax.device_put(table, params["embed"].sharding)}
    found = score(model, broken, 1 + stream(9) % (VOCAB - 1))
    assert math.isfinite(found.nats)


@pytest.mark.slow
def test_every_mesh_gives_the_same_score(x64):
    model = tiny("fbi", dtype="float64")
    found = []
    for shape in [(1, 1), (4, 2)]:
        with jax.set_mesh(jax.make_mesh(shape, ("data", "model"), devices=jax.devices()[: math.prod(shape)])):
            found.append(score(model, model.init(0), stream(60), separator=SEPARATOR))
    assert found[1].nats == pytest.approx(found[0].nats, rel=1e-12)


def test_attention_stays_in_documents_where_a_separator_is_given(model, params):
    tokens = 1 + stream(9) % (VOCAB - 1)
    tokens[4] = SEPARATOR
    other = tokens.copy()
    other[1] = tokens[1] % (VOCAB - 1) + 1

    def second_document(tokens, separator):
        nothing = perplexity.NO_TALLY
        total, _ = perplexity._sums(model, separator, nothing, params, jnp.asarray(tokens)[None], jnp.array([4]))
        return float(total)

    with jax.set_mesh(mesh_1x1()):
        assert second_document(tokens, SEPARATOR) == second_document(other, SEPARATOR)
        assert second_document(tokens, None) != second_document(other, None)


def test_a_second_evaluation_compiles_nothing_and_transfers_nothing_unasked(model, params):
    score(model, params, stream(41))
    compiled = perplexity._sums._cache_size()
    changed = jax.tree.map(lambda x: x * 2, params)
    with jax.transfer_guard("disallow"):
        score(model, changed, stream(60, seed=1))
    assert perplexity._sums._cache_size() == compiled


def test_progress_counts_windows(model, params):
    seen = []
    score(model, params, stream(60), progress=lambda done, total: seen.append((done, total)), limit=6)
    assert seen == [(4, 6), (6, 6)]


def test_a_score_without_text_or_past_all_numbers_is_still_a_number():
    assert math.isnan(Score(1.0, 1, 0, 1).bits_per_byte)
    assert Score(1e6, 1, 1, 1).perplexity == math.inf
    assert math.isnan(Score(math.nan, 1, 1, 1).perplexity)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"window": 50}, "41 tokens, less than a window of 50"),
        ({"window": 1}, "at least 2"),
        ({"stride": 0}, "stride is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"limit": -1}, "limit is -1"),
        ({"window": 34}, "context 32"),
        ({"token_bytes": BYTES[:5]}, "know 5"),
    ],
)
def test_what_cannot_be_scored_is_refused(model, params, changes, says):
    with pytest.raises(InputError, match=says):
        score(model, params, stream(41), **changes)


def test_a_batch_that_does_not_divide_over_the_mesh_is_refused(model, params):
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "model"))), pytest.raises(InputError, match="multiple of 4"):
        score(model, params, stream(41), batch=6)
