"""Losses against their formulas, written out in NumPy and float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_support import B, T, V, close, featured, log_softmax, normal, outputs, slope, softmax

from fbi.errors import InputError
from fbi.loss import (
    KINDS,
    Loss,
    Outputs,
    Term,
    confidence_aware_kl,
    distillation,
    forward_kl,
    hidden_states,
    next_token,
    reverse_kl,
    teacher_entropy,
)


def test_cross_entropy_of_uniform_logits_is_the_logarithm_of_the_vocabulary():
    out = Outputs(jnp.full((1, 2, V), 3.0), jnp.array([[0, 5]]))
    close(next_token(out), [[math.log(V)] * 2], 1e-6)


def test_cross_entropy_by_hand():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]))
    close(next_token(Outputs(logits, jnp.array([[1, 2]]))), [[math.log(4), -math.log(0.8)]], 1e-6)


def test_cross_entropy_is_minus_the_log_probability_of_the_label(x64):
    out = outputs()
    close(next_token(out), -np.take_along_axis(log_softmax(out.logits), np.asarray(out.labels)[..., None], -1)[..., 0])
    close(next_token(out._replace(logits=out.logits + 1000)), next_token(out), 1e-9)  # no overflow


def test_distillation_is_the_cross_entropy_to_the_teacher(x64):
    out = outputs()
    close(distillation(out), -(softmax(out.teacher_logits) * log_softmax(out.logits)).sum(-1))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_temperature_softens_both_sides_and_keeps_the_size_of_gradients(temperature, x64):
    out = outputs()
    teacher, student = out.teacher_logits / temperature, out.logits / temperature
    close(
        distillation(out, temperature=temperature),
        -(temperature**2) * (softmax(teacher) * log_softmax(student)).sum(-1),
    )


def test_at_a_high_temperature_the_gradient_is_that_of_centred_logits(x64):
    out = outputs()
    t = 1e4
    gradient = jax.grad(lambda x: distillation(out._replace(logits=x), temperature=t).sum())(out.logits)
    student, teacher = (np.asarray(x) - np.mean(x, -1, keepdims=True) for x in (out.logits, out.teacher_logits))
    close(gradient, (student - teacher) / V, 1e-3)  # Hinton et al., arXiv 1503.02531, equation 4


@pytest.mark.parametrize("top_k", [1, 3])
def test_top_k_keeps_the_likeliest_tokens_of_the_teacher(top_k, x64):
    out = outputs()
    p = softmax(out.teacher_logits)
    p = np.where(p >= np.sort(p, -1)[..., -top_k][..., None], p, 0)
    assert ((p > 0).sum(-1) == top_k).all()
    close(distillation(out, top_k=top_k), -(p / p.sum(-1, keepdims=True) * log_softmax(out.logits)).sum(-1))


@pytest.mark.parametrize("top_k", [V, V + 5, 0])
def test_top_k_with_all_tokens_is_the_whole_distribution(top_k):
    out = outputs()
    assert jnp.array_equal(distillation(out, top_k=top_k), distillation(out))


def test_the_teacher_itself_costs_its_entropy(x64):
    out = outputs()
    same = out._replace(logits=out.teacher_logits)
    p = softmax(out.teacher_logits)
    close(teacher_entropy(out), -(p * np.log(p)).sum(-1))
    close(distillation(same), teacher_entropy(same))
    total, sums = Loss.parse("ad")(same)
    close(total, sums["floor"])
    assert bool(jnp.all(distillation(out) > teacher_entropy(out)))  # Gibbs


def test_the_gradient_at_the_logits_is_the_difference_of_probabilities(x64):
    out = outputs()
    count = B * T

    def mean(logits, text):
        return Loss.parse(text)(out._replace(logits=logits))[0] / count

    p_student, p_teacher = softmax(out.logits), softmax(out.teacher_logits)
    one_hot = np.eye(V)[np.asarray(out.labels)]
    close(jax.grad(mean)(out.logits, "ad"), (p_student - p_teacher) / count)
    close(jax.grad(mean)(out.logits, "ce"), (p_student - one_hot) / count)
    close(jax.grad(mean)(out.logits, "mix"), (p_student - (p_teacher + one_hot) / 2) / count)
    close(jax.grad(mean)(out.logits, "kl"), (p_student - p_teacher) / count)
    close(jax.grad(mean)(out.teacher_logits, "ad"), 0 * p_teacher)


def test_the_divergences_are_their_formulas(x64):
    out = outputs()
    p, q = softmax(out.teacher_logits), softmax(out.logits)
    close(forward_kl(out), (p * np.log(p / q)).sum(-1))
    close(reverse_kl(out), (q * np.log(q / p)).sum(-1))
    close(forward_kl(out), distillation(out) - teacher_entropy(out))
    p, q = softmax(out.teacher_logits / 3), softmax(out.logits / 3)
    close(forward_kl(out, temperature=3.0), 9 * (p * np.log(p / q)).sum(-1))
    close(reverse_kl(out, temperature=3.0), 9 * (q * np.log(q / p)).sum(-1))
    far = out._replace(logits=out.logits + 1000)  # no overflow, and where no probability is left no log of zero
    close(forward_kl(far), forward_kl(out), 1e-9)
    assert bool(jnp.isfinite(reverse_kl(out._replace(teacher_logits=100 * out.teacher_logits))).all())


def test_divergences_by_hand():
    teacher, student = jnp.log(jnp.array([[[0.5, 0.5]]])), jnp.log(jnp.array([[[0.75, 0.25]]]))
    out = Outputs(student, jnp.array([[0]]), teacher)
    close(forward_kl(out), [[0.5 * math.log(4 / 3)]], 1e-6)
    close(reverse_kl(out), [[0.75 * math.log(1.5) - 0.25 * math.log(2)]], 1e-6)
    close(confidence_aware_kl(out), 0.5 * (forward_kl(out) + reverse_kl(out)), 1e-6)  # the teacher gives the label 1/2


@pytest.mark.parametrize("text", ["rkl", "rkl:temperature=2", "cakld", "kl:temperature=0.5"])
def test_gradients_at_the_logits_are_the_finite_differences(text, x64):
    out, direction = outputs(), normal(5)
    function = lambda x: Loss.parse(text)(out._replace(logits=x))[0]
    expected = slope(function, out.logits, direction)
    assert float(jnp.sum(jax.grad(function)(out.logits) * direction)) == pytest.approx(expected, rel=1e-7)
    assert abs(expected) > 1e-2


def test_the_gradient_of_the_reverse_divergence_by_its_formula(x64):
    out = outputs()
    p, q = softmax(out.teacher_logits), softmax(out.logits)
    surprise = np.log(q / p)
    gradient = jax.grad(lambda x: reverse_kl(out._replace(logits=x)).sum())(out.logits)
    close(gradient, q * (surprise - (q * surprise).sum(-1, keepdims=True)))


def test_confidence_weighs_the_two_divergences(x64):
    out = outputs()
    forward, reverse = np.asarray(forward_kl(out)), np.asarray(reverse_kl(out))
    close(confidence_aware_kl(out, beta=0.0), forward)
    close(confidence_aware_kl(out, beta=1.0), reverse)
    labelled = np.take_along_axis(softmax(out.teacher_logits), np.asarray(out.labels)[..., None], -1)
    beta = labelled.mean()
    assert 0 < beta < 1
    close(confidence_aware_kl(out), beta * reverse + (1 - beta) * forward)
    t = 2.0
    expected = beta * reverse_kl(out, temperature=t) + (1 - beta) * forward_kl(out, temperature=t)
    close(confidence_aware_kl(out, temperature=t), expected)
    assert float(Loss.parse("cakld:beta=0.25")(out)[0]) == pytest.approx((0.25 * reverse + 0.75 * forward).sum())
    assert Loss.parse("2*cakld + ce").whole_batch == ("cakld",)  # its beta is a mean over the batch
    assert Loss.parse("cakld:beta=0 + kl + dmd").whole_batch == ()


@pytest.mark.parametrize("text", ["kl", "rkl", "cakld", "kl:temperature=2", "cakld:beta=1", "hidden", "dmd"])
def test_a_student_like_its_teacher_costs_nothing_and_stays(text, x64):
    out = featured()
    same = out._replace(logits=out.teacher_logits, features=out.teacher_features)
    function = lambda logits, features: Loss.parse(text)(same._replace(logits=logits, features=features))[0]
    value, gradients = jax.value_and_grad(function, (0, 1))(same.logits, same.features)
    assert abs(float(value)) < 1e-14
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients)) < 1e-14
    assert float(Loss.parse(text)(out)[0]) > 1e-3  # and another one does not


EVERY = ["ad", "ad:temperature=2", "ad:top_k=3", "mix", "kl", "rkl", "cakld", "hidden", "dmd"]


@pytest.mark.parametrize("text", EVERY)
def test_nothing_flows_to_the_teacher(text):
    out = featured()
    function = lambda x, y: Loss.parse(text)(out._replace(teacher_logits=x, teacher_features=y))[0]
    gradients = jax.grad(function, (0, 1))(out.teacher_logits, out.teacher_features)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradients))


def test_distillation_does_not_look_at_the_labels():
    out = outputs()
    other = out._replace(labels=(out.labels + 1) % V)
    loss = Loss.parse("ad:temperature=2")
    assert float(loss(out)[0]) == float(loss(other)[0])
    assert float(loss(out)[1]["ce"]) != float(loss(other)[1]["ce"])  # logged all the same


def test_a_loss_is_the_weighted_sum_of_its_terms(x64):
    out = outputs()
    ce, ad = (float(Loss.parse(text)(out)[0]) for text in ("ce", "ad"))
    for text, expected in [
        ("mix", 0.5 * ce + 0.5 * ad),
        ("0.25*ce+2*ad", 0.25 * ce + 2 * ad),
        (" 3 * ce ", 3 * ce),
        ("ce + ce", 2 * ce),
        ("0.5*ce + 0.5*ce + ad", ce + ad),
        ("ce + 10*hidden", ce + 10 * float(hidden_states(featured()).sum())),
        ("0.5*kl:temperature=2 + 0.5*rkl", 0.5 * float((forward_kl(out, temperature=2.0) + reverse_kl(out)).sum())),
    ]:
        assert float(Loss.parse(text)(featured())[0]) == pytest.approx(expected, rel=1e-13), text


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("ce", {"loss", "ce"}),
        ("ad", {"loss", "ce", "floor", "ad"}),
        ("mix", {"loss", "ce", "floor", "ad"}),
        ("2*kl + 0*hidden + dmd:hidden=0", {"loss", "ce", "floor", "kl", "hidden", "dmd"}),
        ("kl + rkl:temperature=2 + kl:temperature=2", {"loss", "ce", "floor", "kl", "rkl", "kl:temperature=2"}),
    ],
)
def test_sums_are_over_positions_and_scalar(text, names):
    out = featured() if "floor" in names else outputs(teacher=False)
    total, sums = Loss.parse(text)(out)
    assert set(sums) == names
    assert {value.shape for value in sums.values()} == {total.shape} == {()}
    assert float(sums["loss"]) == float(total)
    assert float(sums["ce"]) == pytest.approx(float(next_token(out).sum()), rel=1e-6)
    assert next_token(out).shape == (B, T)
    for term in Loss.parse(text).terms:  # each under its kind, before its weight
        name = "kl:temperature=2" if term == Term(1.0, "kl", (("temperature", 2.0),)) else term.kind
        assert float(sums[name]) == pytest.approx(float(term(out).sum()), rel=1e-6)


def test_logging_the_cross_entropy_adds_nothing_to_the_gradient():
    out = outputs()
    loss = Loss.parse("ad")
    with_sums = jax.grad(lambda x: loss(out._replace(logits=x))[1]["loss"])(out.logits)
    assert not jax.grad(lambda x: loss(out._replace(logits=x))[1]["ce"])(out.logits).any()
    assert jnp.array_equal(with_sums, jax.grad(lambda x: loss(out._replace(logits=x))[0])(out.logits))


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("ce", (Term(1.0, "ce"),)),
        ("ad:temperature=2,top_k=64", (Term(1.0, "ad", (("temperature", 2.0), ("top_k", 64))),)),
        ("mix", (Term(0.5, "ce"), Term(0.5, "ad"))),
        ("0.3*ce + 0.7*ad: temperature = 2", (Term(0.3, "ce"), Term(0.7, "ad", (("temperature", 2.0),)))),
        ("1e-2*ce", (Term(0.01, "ce"),)),
        ("ce + 10*hidden", (Term(1.0, "ce"), Term(10.0, "hidden"))),
        ("0.5*kl:temperature=2 + 0.5*rkl", (Term(0.5, "kl", (("temperature", 2.0),)), Term(0.5, "rkl"))),
        (
            "dmd:hidden=0,layers=2 + cakld:beta=0.5",
            (Term(1.0, "dmd", (("hidden", 0.0), ("layers", 2))), Term(1.0, "cakld", (("beta", 0.5),))),
        ),
    ],
)
def test_text_is_read_as_terms(text, terms):
    loss = Loss.parse(text)
    assert loss.terms == terms
    assert loss.needs_teacher == any(term.kind != "ce" for term in terms)
    assert {type(value) for term in loss.terms for _, value in term.options} <= {int, float}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "'' is not WEIGHT.KIND:OPTIONS"),
        (
            "xent",
            "unknown loss 'xent'; valid: ad, cakld, ce, dmd, efficiency, hidden, kl, mix, prediction, rkl, sep",
        ),
        ("mx", r"did you mean 'mix'\?"),
        ("ce +", "'' is not WEIGHT.KIND:OPTIONS"),
        ("2**ce", "is not WEIGHT.KIND"),
        ("two*ce", "loss weight='two' is not a number"),
        ("nan*ce", "the weight nan must be a finite number"),
        (
            "ad:temperatur=2",
            r"unknown ad option 'temperatur' \(did you mean 'temperature'\?\); valid: temperature, top_k",
        ),
        ("ce:top_k=2", "unknown ce option 'top_k'; valid: none"),
        ("ad:temperature", "ad:temperature='' is not a number"),
        ("ad:top_k=1.5", "ad:top_k='1.5' is not a whole number"),
        ("ad:temperature=0", "temperature=0.0 must be above 0"),
        ("ad:temperature=nan", "temperature=nan must be above 0"),
        ("ad:temperature=inf", "temperature=inf must be above 0 and finite"),
        ("ad:top_k=-1", "top_k=-1 must be at least 0"),
        ("ad:top_k=1,top_k=2", "option 'top_k' is given twice"),
        ("kl:top_k=3", "unknown kl option 'top_k'; valid: temperature"),
        ("rkl:temperature=-1", "temperature=-1.0 must be above 0"),
        ("cakld:beta=1.5", "beta=1.5 must be from 0 to 1"),
        ("cakld:beta=nan", "beta=nan must be from 0 to 1"),
        ("hidden:layers=-1", r"layers=-1 must be at least 0 \(0: all\)"),
        ("hidden:layers=half", "hidden:layers='half' is not a whole number"),
        ("dmd:hidden=-2", "hidden=-2.0 must be at least 0"),
    ],
)
def test_text_that_is_no_loss_is_refused(text, says):
    with pytest.raises(InputError, match=says):
        Loss.parse(text)


@pytest.mark.parametrize("kind", sorted(name for name, kind in KINDS.items() if kind.needs_teacher))
def test_a_term_without_its_teacher_is_refused(kind):
    with pytest.raises(InputError, match=f"'{kind}' needs a teacher; set teacher to the directory"):
        Loss.parse(kind)(outputs(teacher=False))


def test_terms_over_logits_ask_for_no_features():
    assert Loss.parse("ce + ad + kl + rkl + cakld").features == ()
    assert Loss.parse("hidden + dmd:hidden=0 + 2*hidden").features == (
        "layers.*.out", "layers.*.attn.q.out", "layers.*.attn.k.out", "layers.*.attn.v.out",
    )  # fmt: skip


def test_shapes_that_do_not_fit_are_refused():
    out = outputs()
    for wrong in [
        out._replace(logits=out.logits[0]),
        out._replace(labels=out.labels[:, :2]),
        out._replace(teacher_logits=out.teacher_logits[..., :4]),
        out._replace(labels=out.labels[..., None]),
    ]:
        with pytest.raises((TypeError, ValueError)):
            Loss.parse("mix")(wrong)


def test_every_kind_is_tested_here():
    assert set(KINDS) == {"ce", "ad", "kl", "rkl", "cakld", "hidden", "dmd", "efficiency", "separability", "prediction"}


@pytest.mark.parametrize("text", ["ce", "ad", "ad:temperature=2,top_k=3", "mix", "kl + rkl", "cakld:temperature=2"])
def test_a_vocabulary_split_over_devices_gives_the_same(text, x64):
    loss = Loss.parse(text)
    out = outputs()

    def gradient(out):
        return jax.grad(lambda x: loss(out._replace(logits=x)), has_aux=True)(out.logits)

    expected, sums = jax.jit(gradient)(out)
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    with jax.set_mesh(mesh):
        split = jax.NamedSharding(mesh, jax.P("data", None, "model"))
        rows = jax.NamedSharding(mesh, jax.P("data", None))
        found, found_sums = jax.jit(gradient)(Outputs(*jax.device_put(tuple(out[:3]), (split, rows, split))))
    assert found.sharding.spec == split.spec
    close(found, np.asarray(expected))
    assert set(found_sums) == set(sums)
    for name in sums:
        assert float(found_sums[name]) == pytest.approx(float(sums[name]), rel=1e-13)
