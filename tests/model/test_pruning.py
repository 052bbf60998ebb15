"""Pruning: the weights that go, by hand and by what their loss costs; patterns, what stays where it is, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbi.errors import InputError
from fbi.model import Model
from fbi.model.pruning import CRITERIA, Pruning, kept, norms, prune, zero_share
from fbi.policy import Policy


def mask_of(text, w, norm=None):
    pruning, w = Pruning.parse(text), np.asarray(w, np.float32)
    return kept(w, CRITERIA[pruning.criterion].score(w, norm), pruning).astype(int)


def test_wanda_and_magnitude_by_hand():
    w = [[4.0, 0.1], [-3, 0.2], [2, -0.3], [1, 0.4]]  # [in, out]
    norm = np.array([0.1, 1, 2, 1], np.float32)
    # |W| norm: 0.4 3 4 1 in the first output, 0.01 0.2 0.6 0.4 in the second: the two largest of each
    np.testing.assert_array_equal(mask_of("wanda", w, norm), [[0, 0], [1, 0], [1, 1], [0, 1]])
    np.testing.assert_array_equal(mask_of("wanda:sparsity=0.25", w, norm), [[0, 0], [1, 1], [1, 1], [1, 1]])
    # of the whole matrix the four largest; in each pair along the inputs the larger one
    np.testing.assert_array_equal(mask_of("magnitude", w), [[1, 0], [1, 0], [1, 0], [1, 0]])
    np.testing.assert_array_equal(mask_of("magnitude:pattern=1:2", w), [[1, 0], [0, 1], [1, 0], [0, 1]])
    np.testing.assert_array_equal(mask_of("wanda:pattern=2:4", w, norm), [[0, 0], [1, 0], [1, 1], [0, 1]])
    x = np.array([[3.0, 0], [4, 2]])
    np.testing.assert_allclose(norms(jnp.asarray(x)[None]), [5, 2])


@pytest.mark.parametrize(
    ("text", "share"),
    [("wanda", 0.5), ("wanda:pattern=2:4", 0.5), ("magnitude:sparsity=0.25", 0.25),
     ("wanda:sparsity=0.5,pattern=expert,expert=8", 0.5), ("magnitude:sparsity=0.25,pattern=neuron", 0.25)],
)  # fmt: skip
def test_every_matrix_of_every_mlp_loses_its_share_and_nothing_else_changes(text, share, tiny, drawn):
    model = Model(tiny(norm="sub"), Policy.parse("layers.1.*: w=bitnet-b158"))
    params = drawn(model)
    rng = np.random.default_rng(0)
    seen = {"mlp.up": rng.uniform(1, 2, (3, 32)), "mlp.down": rng.uniform(1, 2, (3, 48))}
    pruning = Pruning.parse(text)
    pruned = prune(pruning, params, seen)
    assert float(zero_share(pruned)) == pytest.approx(share)
    assert float(zero_share(params)) == 0

    def compare(path, a, b):
        names = [entry.key for entry in path]
        assert b.sharding == a.sharding
        a, b = np.asarray(a), np.asarray(b)
        if "mlp" in names and names[-1] == "w":
            assert (b == 0).mean() == pytest.approx(share)
            np.testing.assert_array_equal(b[b != 0], a[b != 0])
            if pruning.block:  # a block of neurons goes as one, the same in gate, up and down
                dead = (b == 0).all(2 if names[-2] == "down" else 1).reshape(len(b), -1, pruning.block)
                assert (dead.all(-1) | ~dead.any(-1)).all()
                assert dead.all(-1).mean() == pytest.approx(share)
        else:
            np.testing.assert_array_equal(a, b)

    jax.tree_util.tree_map_with_path(compare, params, pruned)


def test_what_a_criterion_keeps_costs_less_than_what_another_keeps():
    # Inputs of unlike sizes: the error of the product is what Wanda looks at.
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 64)) * np.exp(rng.standard_normal(64))
    w = rng.standard_normal((64, 32)).astype(np.float32)
    norm = np.sqrt((x**2).sum(0)).astype(np.float32)
    error = {text: np.linalg.norm(x @ (w - w * mask_of(text, w, norm))) for text in ("wanda", "magnitude")}
    assert error["wanda"] < 0.8 * error["magnitude"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("wander", "unknown pruning 'wander' .did you mean 'wanda'"),
        ("wanda:share=0.5", "unknown pruning option 'share'"),
        ("wanda:sparsity=1", "sparsity=1.0 must be above 0 and below 1"),
        ("wanda:sparsity=half", "sparsity='half' is not a number; write for example wanda:"),
        ("wanda:pattern=rows", "unknown pruning pattern 'rows'"),
        ("wanda:pattern=4:4", "keeps 4 of every 4 weights"),
        ("wanda:pattern=2:4,sparsity=0.5", "which says the sparsity"),
        ("wanda:pattern=expert,expert=0", "expert=0 must be at least 1"),
    ],
)
def test_text_that_says_no_pruning_is_refused(text, says):
    with pytest.raises(InputError, match=says):
        Pruning.parse(text)


@pytest.mark.parametrize(
    ("text", "policy", "says"),
    [
        ("wanda:pattern=expert,expert=7", "fp", r"expert=7 does not divide ff=48; use one of \[1, 2, 3"),
        ("wanda:pattern=2:5", "fp", "2:5 needs widths that are multiples of 5, not dim=32, ff=48"),
        (
            "wanda",
            "layers.*.mlp.up: w=fbi",
            "layers.0.mlp.up: w=fbi has levels without a zero, which bring pruned weights back; use policy=fp",
        ),
    ],
)
def test_models_that_cannot_be_pruned_so_are_refused(text, policy, says, tiny):
    with pytest.raises(InputError, match=says):
        Pruning.parse(text).check(tiny(), Policy.parse(policy))
    for policy in ("bitnet-b158", "layers.*.attn.*: w=fbi"):
        Pruning.parse("wanda").check(tiny(), Policy.parse(policy))
