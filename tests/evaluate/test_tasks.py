import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbi.model
from fbi.errors import InputError
from fbi.evaluate.tasks import TASKS, evaluate_task, score
from fbi.evaluate.tasks.metrics import last_word, multiple_choice
from fbi.evaluate.tasks.requests import Request, read_requests
from fbi.evaluate.tasks.score import Likelihood, log_likelihoods, score_tokens
from fbi.evaluate.tasks.tasks import drawn_documents, first_documents

VOCAB, CONTEXT = 280, 64
TEXTS = [
    ("the cat sat on a", " mat"),
    ("the dog", " ran to the house of an old man who saw it"),
    ("", "the cat"),
    ("Question: who sat on the mat, and who said so?\nAnswer:", " the cat"),
    ("the old man said so to all of us and", " saw it and said so"),
]


def tiny(policy="fp", **changes):
    shape = {"layers": 2, "dim": 16, "heads": 2, "kv_heads": 2, "head_dim": 8, "ff": 16, "vocab": VOCAB}
    return fbi.model.build("nano", policy, **(shape | {"context": CONTEXT} | changes))


@pytest.fixture(scope="module")
def model():
    return tiny(init_std=0.3)  # so that no two tokens are about equally likely


@pytest.fixture(scope="module")
def params(model):
    return model.init(0)


def by_hand(model, params, context, continuation):
    """ln p of the continuation and whether greedy decoding gives it, from the logits of one row alone."""
    ids = [*context, *continuation][-(model.config.context + 1) :]
    logits = np.asarray(model.apply(params, jnp.asarray([ids[:-1]])), np.float64)[0]
    own = range(len(ids) - 1 - len(continuation), len(ids) - 1)
    log_p = [logits[i, ids[i + 1]] - np.log(np.exp(logits[i] - logits[i].max()).sum()) - logits[i].max() for i in own]
    return math.fsum(log_p), all(int(logits[i].argmax()) == ids[i + 1] for i in own)


# ---- requests

COUNTS = {  # documents, answers of each
    "boolq": (3270, {2: 3270}), "piqa": (1838, {2: 1838}), "hellaswag": (10042, {4: 10042}),
    "winogrande": (1267, {2: 1267}), "arc_easy": (570, {3: 1, 4: 567, 5: 2}), "arc_easy_test": (2376, None),
    "arc_challenge": (299, {3: 3, 4: 295, 5: 1}), "arc_challenge_test": (1172, None), "openbookqa": (500, {4: 500}),
    "openbookqa_test": (500, {4: 500}), "lambada": (5153, {1: 5153}),
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_every_document_of_a_task_is_there_with_its_answers(name, package_cache):
    requests = TASKS[name].requests()
    answers = collections.Counter(request.doc for request in requests)
    documents, choices = COUNTS[name]
    assert len(answers) == documents
    assert choices is None or collections.Counter(answers.values()) == choices
    assert max(answers) < 1_000_000
    for doc, group in _grouped(requests).items():
        assert [request.choice for request in group] == list(range(answers[doc]))
        assert {request.label for request in group} == {group[0].label}
        assert 0 <= group[0].label < answers[doc]
    for request in requests:
        assert request.context
        assert not request.context[-1].isspace()
        assert request.continuation[0] == " "
        assert request.continuation[1:].strip()
    same = name not in ("winogrande", "lambada")  # the answers differ in the continuation, those of WinoGrande before
    assert all(
        (len({r.context for r in group}) == 1) == (same or len(group) == 1) for group in _grouped(requests).values()
    )


def _grouped(requests):
    groups = {}
    for request in requests:
        groups.setdefault(request.doc, []).append(request)
    return groups


def test_requests_are_the_published_ones(package_cache):
    first = TASKS["piqa"].requests(2)[2:]
    context = "Goal: dresser\nAnswer:"
    assert first == [
        Request(1, 0, context, " replace drawer with bobby pin ", 1),
        Request(1, 1, context, " finish, woodgrain with  bobby pin ", 1),
    ]
    assert TASKS["winogrande"].requests(1)[0].context == "Sarah was a much better surgeon than Maria so Sarah"
    assert TASKS["lambada"].requests()[0].continuation == " signs"


@pytest.mark.parametrize("task", ["arc_easy", "arc_challenge", "openbookqa"])
def test_a_question_without_its_examples_is_the_zero_shot_request(task, package_cache):
    whole = read_requests(f"{task}/val_rc_5shot")
    assert all(request.context.count("\n\nQuestion:") == 5 for request in whole)
    bare = {(r.context, r.continuation, r.label) for r in read_requests(f"{task}/val_rc_5shot", examples=True)}
    assert bare == {(r.context, r.continuation, r.label) for r in read_requests(f"{task}/rc_0shot")}


def test_a_variant_that_the_package_lacks_is_an_error(package_cache):
    with pytest.raises(InputError, match=r"has no .*piqa/rc_9shot.*give a folder below"):
        read_requests("piqa/rc_9shot")


def _requests(docs, choices=2):
    return [Request(doc, choice, "", " a", 0) for doc in docs for choice in range(choices)]


def test_a_limit_takes_the_first_documents_whole_or_draws_them():
    requests = _requests([3, 5, 9, 11])
    assert [r.doc for r in first_documents(requests, 2, seed=7)] == [3, 3, 5, 5]
    assert first_documents(requests, 10, 0) == requests
    many = _requests(range(100), choices=1)
    drawn = [r.doc for r in drawn_documents(many, 10, seed=0)]
    assert drawn == sorted(np.random.default_rng(0).permutation(100)[:10].tolist())
    assert drawn != [r.doc for r in drawn_documents(many, 10, seed=1)]
    assert drawn_documents(many, 1000, 0) == many


# ---- log-likelihoods


def test_a_log_likelihood_is_the_sum_of_the_log_softmax_of_each_token(model, params, tokenizer):
    found = log_likelihoods(model, params, tokenizer, TEXTS, batch=2)
    for (context, continuation), likelihood in zip(TEXTS, found, strict=True):
        start = tokenizer.encode(context) or [tokenizer.separator]
        log_p, greedy = by_hand(model, params, start, tokenizer.encode(continuation))
        assert likelihood.log_p == pytest.approx(log_p, rel=1e-5)
        assert likelihood.greedy == greedy


def test_context_and_continuation_are_encoded_apart(model, params, tokenizer):
    context, continuation = tokenizer.encode("of t"), tokenizer.encode("he")
    assert tokenizer.encode("of the") != context + continuation
    (found,) = log_likelihoods(model, params, tokenizer, [("of t", "he")], batch=1)
    assert found.log_p == pytest.approx(by_hand(model, params, context, continuation)[0], rel=1e-5)


def test_neither_batch_nor_padding_nor_order_changes_a_score(x64):
    model = tiny("bitnet-b158", dtype="float64")
    params = model.init(0)
    draw = np.random.default_rng(0)
    sizes = [(3, 2), (40, 2), (20, 12), (9, 1), (45, 13)]
    pairs = [tuple(draw.integers(0, VOCAB, size).tolist() for size in pair) for pair in sizes]
    alone = [score_tokens(model, params, [pair], batch=1)[0].log_p for pair in pairs]
    together = [found.log_p for found in score_tokens(model, params, pairs, batch=4)]
    assert together == pytest.approx(alone, rel=1e-12)
    backwards = [found.log_p for found in score_tokens(model, params, pairs[::-1], batch=4)]
    assert backwards[::-1] == pytest.approx(alone, rel=1e-12)


def test_what_greedy_decoding_gives_is_greedy_and_nothing_else(model, params, tokenizer):
    ids = tokenizer.encode("the cat sat")
    added = []
    for _ in range(3):
        added.append(int(np.asarray(model.apply(params, jnp.asarray([[*ids, *added]])))[0, -1].argmax()))
    wrong = [[*added[:i], (added[i] + 1) % VOCAB, *added[i + 1 :]] for i in range(3)]
    found = score_tokens(model, params, [(ids, added), *((ids, w) for w in wrong)], batch=4)
    assert [likelihood.greedy for likelihood in found] == [True, False, False, False]


def test_of_a_long_context_the_right_end_is_kept(model, params):
    draw = np.random.default_rng(1)
    long, own = draw.integers(0, VOCAB, 100).tolist(), draw.integers(0, VOCAB, 5).tolist()
    whole, cut, shorter = score_tokens(
        model, params, [(long, own), (long[-(CONTEXT - 4) :], own), (long[-(CONTEXT - 5) :], own)], batch=1
    )
    assert whole == cut  # 60 tokens of context and 4 of the 5 scored ones fill the model's 64
    assert whole.log_p == pytest.approx(by_hand(model, params, long, own)[0], rel=1e-5)
    assert shorter.log_p != whole.log_p


def test_a_continuation_as_long_as_the_context_of_the_model_is_scored_and_an_empty_one_is_certain(model, params):
    own = np.random.default_rng(2).integers(0, VOCAB, CONTEXT).tolist()
    full, empty = score_tokens(model, params, [([1], own), ([1, 2], [])], batch=2)
    assert full.log_p == pytest.approx(by_hand(model, params, [1], own)[0], rel=1e-5)
    assert empty == Likelihood(0.0, True)
    assert score_tokens(model, params, [], batch=2) == []


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_every_mesh_gives_the_same_scores(x64, tied, tokenizer):
    model = tiny("bitnet-b158", dtype="float64", tied=tied, init_std=0.3)
    found = []
    for shape in [(1, 1), (4, 2)]:
        with jax.set_mesh(jax.make_mesh(shape, ("data", "model"), devices=jax.devices()[: math.prod(shape)])):
            found.append(log_likelihoods(model, model.init(0), tokenizer, TEXTS, batch=4))
    assert [s.log_p for s in found[1]] == pytest.approx([s.log_p for s in found[0]], rel=1e-12)
    assert [s.greedy for s in found[1]] == [s.greedy for s in found[0]]


def test_rows_of_one_shape_share_a_program(model, params):
    draw = np.random.default_rng(3)
    pairs = [(draw.integers(0, VOCAB, n).tolist(), [1, 2]) for n in (3, 9, 20, 31)]
    score_tokens(model, params, pairs[:1], batch=2)
    compiled = score._score._cache_size()
    score_tokens(model, params, pairs, batch=2)
    assert score._score._cache_size() == compiled


def test_the_head_alone_gives_the_logits_of_the_whole_model(model, params):
    tokens = jnp.arange(12).reshape(2, 6)
    logits, features = model.features(params, tokens, wanted=["head"])
    np.testing.assert_array_equal(model.head(params, features["head"]), logits)


def test_progress_counts_answers(model, params, tokenizer):
    seen = []
    log_likelihoods(model, params, tokenizer, TEXTS, batch=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize(
    ("pair", "batch", "says"),
    [
        (([1], [2] * 65), 1, "continuation of 65 tokens passes the model's context of 64"),
        (([], [2]), 1, "empty context"),
        (([1], [280]), 1, "token 280; the model knows 0 to 279"),
        (([-1], [2]), 1, "token -1"),
        (([1], [2]), 0, "batch is 0"),
    ],
)
def test_what_cannot_be_scored_is_refused(pair, batch, says, model, params):
    with pytest.raises(InputError, match=says):
        score_tokens(model, params, [pair], batch=batch)


def test_a_foreign_tokenizer_and_a_batch_that_does_not_split_are_refused(tokenizer, params, model):
    with pytest.raises(InputError, match="the tokenizer has 280 tokens, the model 100"):
        log_likelihoods(tiny(vocab=100), {}, tokenizer, TEXTS)
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "model"))), pytest.raises(InputError, match="multiple of 4"):
        score_tokens(model, params, [([1], [2])], batch=6)


# ---- metrics

ANSWERS = [  # document 0: right answer 1, document 4: right answer 0 of three
    Request(0, 0, "q", " no", 1), Request(0, 1, "q", " yes", 1),
    Request(4, 0, "q", " an apple", 0), Request(4, 1, "q", " a", 0), Request(4, 2, "q", " pear", 0),
]  # fmt: skip


def scores(*values):
    return [Likelihood(value, False) for value in values]


def test_accuracies_are_the_shares_of_right_answers():
    found = multiple_choice("t", ANSWERS, scores(-3.0, -2.0, -4.0, -1.0, -9.0))
    # by characters: -3/2 < -2/3, right; -4/8 > -1/1 and > -9/4, right only so
    assert (found.documents, found.accuracy, found.accuracy_norm) == (2, 0.5, 1.0)
    assert found.stderr == pytest.approx(math.sqrt(0.25 / 2))
    assert found.stderr_norm == 0.0
    assert found.chance == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert found.bits_per_byte == pytest.approx((2.0 + 4.0) / math.log(2) / (4 + 9))
    assert found.perplexity is None
    wrong = multiple_choice("t", ANSWERS, scores(-2.0, -3.1, -4.0, -1.0, -3.0))
    assert (wrong.accuracy, wrong.accuracy_norm) == (0.0, 0.5)


def test_the_first_of_equal_answers_is_taken():
    assert multiple_choice("t", ANSWERS, scores(-2.0, -2.0, -4.0, -4.0, -4.0)).accuracy == 0.5


def test_the_last_word_is_right_where_it_is_greedy():
    requests = [Request(i, 0, "q", word, 0) for i, word in enumerate([" one", " three", " été"])]
    found = last_word("t", requests, [Likelihood(-1.0, True), Likelihood(-2.0, False), Likelihood(-6.0, True)])
    assert (found.documents, found.accuracy) == (3, pytest.approx(2 / 3))
    assert found.perplexity == pytest.approx(math.exp(3))
    assert found.bits_per_byte == pytest.approx(9 / math.log(2) / (4 + 6 + 6))  # é takes two bytes
    assert found.stderr == pytest.approx(math.sqrt(2 / 9 / 3))
    assert (found.accuracy_norm, found.stderr_norm, found.chance) == (None, None, None)


def test_a_broken_model_has_no_accuracy_rather_than_a_chance_one():
    found = multiple_choice("t", ANSWERS, scores(math.nan, math.nan, -4.0, -1.0, -9.0))
    assert all(map(math.isnan, (found.accuracy, found.accuracy_norm, found.bits_per_byte, found.stderr)))
    request = [Request(0, 0, "q", " a", 0)]
    assert math.isnan(last_word("t", request, scores(math.nan)).accuracy)
    assert last_word("t", request, scores(-1e6)).perplexity == math.inf


# ---- tasks


@pytest.mark.parametrize("name", ["lambada", "winogrande"])
def test_a_task_is_scored_as_its_requests_are(name, tokenizer, package_cache):
    model = tiny(init_std=0.3, context=256)
    params = model.init(0)
    found = evaluate_task(model, params, tokenizer, name, limit=3, seed=0, batch=4)
    requests = TASKS[name].requests(3, 0)
    likelihoods = [
        Likelihood(*by_hand(model, params, tokenizer.encode(r.context), tokenizer.encode(r.continuation)))
        for r in requests
    ]
    expected = TASKS[name].score(name, requests, likelihoods)
    assert (found.documents, found.accuracy, found.accuracy_norm) == (3, expected.accuracy, expected.accuracy_norm)
    assert found.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-5)


def test_unknown_tasks_and_limits_are_refused(model, params, tokenizer):
    with pytest.raises(InputError, match=r"unknown task 'pica' \(did you mean 'piqa'\?\); valid: arc_challenge, "):
        evaluate_task(model, params, tokenizer, "pica")
    with pytest.raises(InputError, match="limit is 0; it must be at least 1"):
        evaluate_task(model, params, tokenizer, "piqa", limit=0)


@pytest.mark.slow
def test_smollm2_reaches_its_known_accuracy(package_cache, optimized):
    from fbi.train.load import load_named

    found = evaluate_task(*load_named("smollm2-135m"), "winogrande", limit=40)
    assert abs(found.accuracy - 0.515) < 2 * math.sqrt(0.25 / 40)
    assert found.bits_per_byte < 1.5
