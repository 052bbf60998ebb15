"""The adapter under the harness itself; runs where the extra `eval` is installed."""

import importlib
import json
import math
import subprocess
import sys
import textwrap
import types

import jax.numpy as jnp
import numpy as np
import pytest

import fbi.model
from fbi.errors import InputError

VOCAB, CONTEXT = 280, 64

WITHOUT = """
import sys
sys.modules["lm_eval"] = None  # what Python itself takes for a module that is not there
from fbi.errors import InputError
try:
    import fbi.evaluate.lm_eval
except InputError as error:
    print(error)
"""


def test_without_the_extra_an_error_says_how_to_install_it():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("lm-eval cannot be imported")
    assert done.stdout.endswith("install it with: pip install 'fbi[eval]'\n")


@pytest.fixture(scope="module")
def harness():
    """The adapter's module; the harness and what it imports warn, which is none of our business."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lm_eval = pytest.importorskip("lm_eval")
        from fbi.evaluate import lm_eval as adapter

        tasks = importlib.import_module("lm_eval.tasks")
    return types.SimpleNamespace(lm_eval=lm_eval, tasks=tasks, adapter=adapter)


@pytest.fixture(scope="module")
def model():
    shape = {"layers": 1, "dim": 16, "heads": 2, "kv_heads": 2, "head_dim": 8, "ff": 16, "vocab": VOCAB}
    return fbi.model.build("nano", "fp", context=CONTEXT, init_std=0.3, **shape)


@pytest.fixture(scope="module")
def params(model):
    return model.init(0)


@pytest.fixture
def lm(harness, model, params, tokenizer):
    return harness.adapter.FbiLM(model, params, tokenizer, batch=2)


def ask(*arguments):
    return types.SimpleNamespace(args=arguments)


def log_p(model, params, ids, first):
    """ln p of ids[first:] given what is before each, from the logits of one row."""
    logits = np.asarray(model.apply(params, jnp.asarray([ids[:-1]])), np.float64)[0]
    normal = np.log(np.exp(logits).sum(-1))
    return math.fsum(logits[i - 1, ids[i]] - normal[i - 1] for i in range(first, len(ids)))


QUESTIONS = [
    {"question": "The cat sat on a", "choices": ["mat", "house", "dog"], "answer": 0},
    {"question": "The dog ran to the", "choices": ["old man", "house", "us"], "answer": 1},
    {"question": "And who said so?", "choices": ["a mat", "all of us", "an old man"], "answer": 2},
    {"question": "Who saw it?", "choices": ["the man", "the mat", "it"], "answer": 0},
]
CHOICE = """
    task: local_choice
    dataset_path: json
    dataset_kwargs: {{data_files: {{test: {file}}}}}
    test_split: test
    output_type: multiple_choice
    doc_to_text: "{{{{question}}}}"
    doc_to_choice: choices
    doc_to_target: answer
    metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
TEXT = """
    task: local_text
    dataset_path: json
    dataset_kwargs: {{data_files: {{test: {file}}}}}
    test_split: test
    output_type: generate_until
    doc_to_text: "{{{{question}}}}"
    doc_to_target: "{{{{choices[answer]}}}}"
    generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
    metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def evaluated(harness, lm, tmp_path, monkeypatch):
    """What the harness says of the local tasks."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, text in (("choice", CHOICE), ("text", TEXT)):
        (tmp_path / f"{name}.yaml").write_text(textwrap.dedent(text.format(file=file)))
    manager = harness.tasks.TaskManager(include_path=str(tmp_path))
    return harness.lm_eval.simple_evaluate(
        model=lm, tasks=["local_choice", "local_text"], task_manager=manager, bootstrap_iters=0, log_samples=True
    )


@pytest.mark.filterwarnings("default")
def test_the_harness_scores_our_model_as_we_do(evaluated, lm, model, params, tokenizer):
    right = 0
    for question, sample in zip(QUESTIONS, evaluated["samples"]["local_choice"], strict=True):
        context = tokenizer.encode(question["question"])
        own = [
            log_p(model, params, context + tokenizer.encode(f" {choice}"), len(context))
            for choice in question["choices"]
        ]
        assert [float(answer[0][0]) for answer in sample["resps"]] == pytest.approx(own, rel=1e-5)
        right += int(np.argmax(own)) == question["answer"]
    assert evaluated["results"]["local_choice"]["acc,none"] == right / 4
    texts = [sample["resps"][0][0] for sample in evaluated["samples"]["local_text"]]
    assert texts == lm.generate_until([ask(q["question"], {"until": ["\n"], "max_gen_toks": 6}) for q in QUESTIONS])
    exact = [text == question["choices"][question["answer"]] for text, question in zip(texts, QUESTIONS, strict=True)]
    assert evaluated["results"]["local_text"]["exact_match,none"] == sum(exact) / 4


def test_spaces_after_a_context_belong_to_the_continuation(lm, model, params, tokenizer):
    ((found, _),) = lm.loglikelihood([ask("the cat ", "sat")])
    context = tokenizer.encode("the cat")
    assert found == pytest.approx(log_p(model, params, context + tokenizer.encode(" sat"), len(context)), rel=1e-5)
    ((empty, _),) = lm.loglikelihood([ask("", "sat")])
    assert empty == pytest.approx(log_p(model, params, [tokenizer.separator, *tokenizer.encode("sat")], 1), rel=1e-5)


def test_a_rolling_likelihood_scores_every_token_once(lm, model, params, tokenizer):
    short, long = "the cat sat on a mat", "the dog ran to the house of an old man " * 6
    ids, start = tokenizer.encode(long), tokenizer.separator
    assert CONTEXT < len(ids) <= 2 * CONTEXT
    found = lm.loglikelihood_rolling([ask(short), ask(long), ask("")])
    # a whole window from the separator on, then one that ends where the text does, of which the rest is new
    second = log_p(model, params, ids[-(CONTEXT + 1) :], CONTEXT + 1 - (len(ids) - CONTEXT))
    expected = log_p(model, params, [start, *ids[:CONTEXT]], 1) + second
    assert found == pytest.approx([log_p(model, params, [start, *tokenizer.encode(short)], 1), expected, 0.0], rel=1e-5)


def test_text_is_greedy_and_ends_before_the_first_stop(lm, model, params, tokenizer):
    (whole,) = lm.generate_until([ask("the cat", {"max_gen_toks": 8})])
    ids = tokenizer.encode("the cat")
    for _ in range(8):
        ids.append(int(np.asarray(model.apply(params, jnp.asarray([ids])))[0, -1].argmax()))
    assert tokenizer.separator not in ids
    assert whole == tokenizer.decode(ids[len(tokenizer.encode("the cat")) :])
    stop = whole[3:5]
    asked = [ask("the cat", {"until": [stop, whole[-1]], "max_gen_toks": 8}), ask("the cat", {"max_new_tokens": 2}),
             ask("the", {"until": stop, "max_gen_toks": 8})]  # fmt: skip
    cut, short, _ = lm.generate_until(asked)
    assert cut == whole[: min(whole.find(stop), whole.find(whole[-1]))]
    assert whole.startswith(short)


def test_what_a_task_says_of_sampling_is_read_as_the_harness_reads_it(harness):
    sampling = harness.adapter.sampling
    assert sampling({}) == ((), 256, 0.0, 1.0)
    assert sampling({"until": "\n", "max_gen_toks": 5, "temperature": 0.0, "top_p": 0.5}) == (("\n",), 5, 0.0, 1.0)
    assert sampling({"do_sample": False, "temperature": 0.7}).temperature == 0
    assert sampling({"temperature": 0.7, "top_p": 0.9})[2:] == (0.7, 0.9)
    assert sampling({"do_sample": True}).temperature == 1


def test_a_prompt_keeps_its_right_end_and_too_many_tokens_are_refused(lm):
    long = "the dog ran to the house of an old man " * 20
    (cut,) = lm.generate_until([ask(long, {"max_gen_toks": 4})])
    assert isinstance(cut, str)
    with pytest.raises(
        InputError, match="max_gen_toks=64 leaves no room in the model's context of 64; ask for at most 63"
    ):
        lm.generate_until([ask("the", {"max_gen_toks": 64})])
