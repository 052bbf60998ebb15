"""Policies: which site gets which method, what the text means, what a report counts."""

import math

import pytest

import fbi.model
from fbi.errors import InputError
from fbi.model import ModelConfig
from fbi.model.functional import sites_of
from fbi.policy import PRESETS, Methods, Policy, Site
from fbi.quant import Method

CONFIG = ModelConfig(vocab=30, dim=8, layers=4, heads=2, kv_heads=1, head_dim=4, ff=12, context=16)
SITES = sites_of(CONFIG)
BLOCK = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
W8 = Method("absmax", bits=8)


class Sites:
    """A model, as far as a report needs one."""

    def __init__(self, sites):
        self.sites = sites


def named(glob, layers=4, sites=SITES):
    """The sites that a rule with this glob gets alone."""
    return set(Policy.parse(f"{glob}: a=absmax:bits=8").bind(sites, layers))


def of_layers(*layers, names=BLOCK):
    return {f"layers.{layer}.{name}" for layer in layers for name in names}


def report(text, sites=SITES):
    return Policy.parse(text).report(Sites(sites))


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("layers.2.attn.q", {"layers.2.attn.q"}),
        ("layers.*.attn.q", of_layers(0, 1, 2, 3, names=["attn.q"])),
        ("layers.*", of_layers(0, 1, 2, 3)),
        ("layers.*.attn.{q,k}", of_layers(0, 1, 2, 3, names=["attn.q", "attn.k"])),
        ("layers.{0,2}.*", of_layers(0, 2)),
        ("layers.-1.*", of_layers(3)),
        ("layers.{0,-1}.mlp.*", of_layers(0, 3, names=["mlp.gate", "mlp.up", "mlp.down"])),
        ("layers.{-1,-2}.mlp.up", of_layers(2, 3, names=["mlp.up"])),
        ("layers.?.attn.?", of_layers(0, 1, 2, 3, names=["attn.q", "attn.k", "attn.v", "attn.o"])),
        ("head", {"head"}),
        ("*", {"embed", "head", *of_layers(0, 1, 2, 3)}),
        ("*.down", of_layers(0, 1, 2, 3, names=["mlp.down"])),
    ],
)
def test_a_glob_names_sites(glob, expected):
    assert named(glob) == expected


def test_a_layer_number_is_whole():
    many = [Site(f"layers.{i}.attn.q", (4, 4)) for i in range(12)]
    assert named("layers.1.*", 12, many) == {"layers.1.attn.q"}
    assert named("layers.-1.*", 12, many) == {"layers.11.attn.q"}
    assert named("layers.1?.*", 12, many) == {"layers.10.attn.q", "layers.11.attn.q"}


def test_signs_of_regular_expressions_mean_themselves():
    odd = [Site("a+b", (2, 2)), Site("aab", (2, 2)), Site("a.b", (2, 2)), Site("axb", (2, 2))]
    assert named("a+b", 0, odd) == {"a+b"}
    assert named("a.b", 0, odd) == {"a.b"}


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("*.kv", {"attn.kv"}),
        ("layers.*.attn.kv", {"attn.kv"}),
        ("layers.*.attn.{kv,probs}", {"attn.kv", "attn.probs"}),
        ("layers.*.attn.{probs,kv}", {"attn.kv", "attn.probs"}),
        ("layers.*.attn.{q,kv}", {"attn.q", "attn.kv"}),
        ("layers.*.attn.*", {"attn.q", "attn.k", "attn.v", "attn.o"}),
        ("layers.*.attn.k?", None),
        ("layers.*.attn.?v", None),
    ],
)
def test_cache_and_probabilities_are_matched_by_their_name_alone(glob, expected):
    if expected is None:
        with pytest.raises(InputError, match="matches nothing"):
            named(glob)
    else:
        assert named(glob) == of_layers(0, 1, 2, 3, names=expected)


def test_the_first_match_wins():
    policy = Policy.parse("layers.{0,-1}.*: w=none | layers.*.attn.q: w=absmax:bits=4 | layers.*: w=fbi;a=absmax")
    bound = policy.bind(SITES, 4)
    assert bound["layers.0.attn.q"] == bound["layers.3.mlp.up"] == Methods()
    assert bound["layers.1.attn.q"] == Methods(Method("absmax", bits=4))
    assert bound["layers.2.mlp.down"] == Methods(Method("fbi"), Method("absmax"))
    assert "head" not in bound
    assert "layers.1.attn.kv" not in bound
    assert policy.at("layers.2.mlp.down", 4) == Methods(Method("fbi"), Method("absmax"))
    assert policy.at("head", 4) == Methods()


@pytest.mark.parametrize(
    "text",
    [
        *PRESETS,
        "layers.{0,-1}.*: w=none | layers.*: w=bitnet-b158;a=absmax:bits=8",
        "  layers.* :  a = absmax:bits=4 ; w=fbi:granularity=output,shift=false|head:w=absmax",
        "*.kv: a=absmax:bits=8",
    ],
)
def test_text_and_policy_are_the_same(text):
    policy = Policy.parse(text)
    assert Policy.parse(str(policy)) == policy
    assert str(Policy.parse(str(policy))) == str(policy)


def test_the_module_reads_a_policy_when_it_is_called():
    assert fbi.policy("fp") == Policy()
    assert fbi.policy("fbi") == Policy.parse(PRESETS["fbi"])
    assert str(fbi.policy("layers.* :w=fbi")) == "layers.*: w=fbi"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "unknown policy ''; valid: .*bitnet-b158.* fp"),
        ("bitnet-b1.58", r"did you mean 'bitnet-b158'\?"),
        ("layers.*", "GLOB: w=METHOD;a=METHOD"),
        (": w=fbi", "has no site or no methods; write GLOB"),
        ("layers.*: ", "gives no method"),
        ("layers.*: fbi", "'fbi' names neither w nor a"),
        ("layers.*: q=fbi", "'q=fbi' names neither w nor a"),
        ("layers.*: w=fbi;w=none", "gives w twice"),
        ("layers.*: w=fbi |", "rule '' has no site"),
        ("layers.*: w=fbj", "unknown method 'fbj'.*did you mean 'fbi'.*bitnet-b158"),
        ("layers.*: w=fbi:bits=1", "unknown fbi option 'bits'; valid: frozen, granularity"),
        ("layers.*: w=fbi:shift", "has no value; write fbi:shift=VALUE"),
        ("layers.*: w=fbi:shift=maybe", "shift='maybe'.*is not valid; allowed: bool"),
        ("layers.*: w=fbi:granularity=row", "'row'.*allowed: input|output|tensor"),
    ],
)
def test_malformed_text_is_refused(text, says):
    with pytest.raises(InputError, match=says):
        Policy.parse(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("layers.4.*: w=fbi", "no site has such a name; sites, N of 0..3: embed, layers.N.attn.q"),
        ("layers.*.attn.w: w=fbi", "matches nothing: no site has such a name"),
        ("layers.*: w=fbi | layers.1.*: w=none", "'layers.1.*: w=none' matches nothing: earlier rules take every site"),
        ("layers.{0: w=fbi", "unbalanced or nested braces"),
        ("layers.0}: w=fbi", "unbalanced or nested braces"),
        ("layers.{0,{1}}.*: w=fbi", "unbalanced or nested braces"),
        ("layers.*: a=fbi", "method 'fbi' cannot take the role activation; methods that can: absmax"),
        ("layers.*: w=absmax:bits=9", "allowed: 2|3|4|5|6|7|8"),
        ("*.kv: w=fbi", "kv has no weight of its own; give a, not w"),
        ("embed: a=absmax", "embed multiplies no activation; give w, not a"),
        ("*: w=fbi", "the embedding keeps no learned scales, as fbi has; put the rule 'embed: w=none' before it"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(text, says):
    with pytest.raises(InputError, match=says):
        Policy.parse(text).bind(SITES, 4)


def test_the_head_of_a_tied_model_has_no_weight():
    tied = ModelConfig(vocab=30, dim=8, layers=1, heads=2, kv_heads=2, head_dim=4, ff=8, context=16, tied=True)
    with pytest.raises(InputError, match="head has no weight of its own"):
        Policy.parse("head: w=absmax").bind(sites_of(tied), 1)
    assert Policy.parse("head: a=absmax").bind(sites_of(tied), 1) == {"head": Methods(activation=Method("absmax"))}


# What a matrix [in, out] costs, by hand: bits as papers count them, and bytes with 32-bit scales.
COSTS = {
    "none": lambda i, o: (16 * i * o, 4 * i * o),
    "fbi": lambda i, o: (i * o + 16 * 2 * i, math.ceil(i * o / 8) + 4 * 2 * i),
    "fbi:shift=false": lambda i, o: (i * o + 16 * i, math.ceil(i * o / 8) + 4 * i),
    "fbi:granularity=tensor": lambda i, o: (i * o + 16 * 2, math.ceil(i * o / 8) + 4 * 2),
    "absmax:bits=4": lambda i, o: (4 * i * o + 16 * o, math.ceil(4 * i * o / 8) + 4 * o),
    "bitnet-b158": lambda i, o: (math.log2(3) * i * o + 16, math.ceil(i * o / 5) + 4),
}


@pytest.mark.parametrize("method", COSTS)
def test_a_report_counts_bits_as_by_hand(method):
    found = report(f"layers.{{0,2}}.*: w={method}")
    quantized = of_layers(0, 2)
    stored, costs = 0, []
    for row in found.rows:
        if not row.shape:
            assert row.bits is None
            continue
        i, o = row.shape
        paper, held = COSTS[method if row.site in quantized else "none"](i, o)
        assert row.bits.weights == i * o
        assert row.bits.paper == pytest.approx(paper, rel=1e-12)
        assert row.bits.stored == held
        assert row.bits.stored_per_weight == 8 * held / (i * o)
        stored += held
        costs += [(i * o, paper, held)] if row.site in quantized else []
    assert found.stored_bytes == stored
    if method == "none":
        assert found.quantized_bits is None
        return
    weights, paper, held = (sum(column) for column in zip(*costs, strict=True))
    assert found.quantized_bits == pytest.approx((paper / weights, 8 * held / weights), rel=1e-12)


def test_equal_neighbours_share_a_row():
    found = report("layers.{0,-1}.*: w=none | layers.1.mlp.up: w=absmax | layers.*: w=fbi")
    merged = {name: (count, str(row.methods.weight)) for name, count, row in found.merged()}
    assert merged["layers.0.attn.q"] == (1, "none")
    assert merged["layers.1-2.attn.q"] == (2, "fbi")
    assert merged["layers.3.attn.q"] == (1, "none")
    assert merged["layers.1.mlp.up"] == (1, "absmax")
    assert merged["layers.2.mlp.up"] == (1, "fbi")
    assert merged["embed"] == merged["head"] == (1, "none")
    assert sum(count for count, _ in merged.values()) == len(SITES)
    assert list(merged) == [name for name, _, _ in found.merged()]  # every name once


def test_layers_that_are_apart_do_not_share_a_row():
    names = [name for name, _, _ in report("layers.{0,2}.*: w=fbi").merged() if "attn.q" in name]
    assert names == [f"layers.{i}.attn.q" for i in range(4)]


def test_a_report_is_a_table():
    lines = str(report("layers.*: w=fbi;a=absmax:bits=8")).splitlines()
    head, rule, *rows, total = lines
    assert " ".join(head.split()) == "site shape weight activation code bits paper bits stored bits MB"
    assert set(rule) == {"-"}
    assert len(rows) == 11
    (up,) = (row.split() for row in rows if ".up" in row)
    assert up == ["layers.0-3.mlp.up", "8x12", "x4", "fbi", "absmax:bits=8", "1", "3.667", "6.333", "0.000"]
    (cache,) = (row.split() for row in rows if ".kv" in row)
    assert cache == ["layers.0-3.attn.kv", "-", "-", "none", "-", "-", "-", "-"]
    assert "quantized weights" in total
    assert "MB stored" in str(report("fp")).splitlines()[-1]
    assert "quantized" not in str(report("fp"))


def test_a_model_shows_the_numbers_of_the_paper():
    model = fbi.model.build("fbi-130m", "fbi")
    assert model.parameter_count() * 4 == 537_062_400  # the published safetensors file, less its header
    found = model.policy.report(model)
    blocks, ends = 12 * (4 * 768 * 768 + 3 * 768 * 2048), 2 * 32_000 * 768
    pairs = 12 * (6 * 768 + 2048)  # of alpha and beta
    assert found.stored_bytes == blocks // 8 + 4 * ends + 4 * 2 * pairs
    assert found.quantized_bits == pytest.approx((1 + 16 * 2 * pairs / blocks, 1 + 32 * 2 * pairs / blocks), rel=1e-12)
    assert [name for name, count, _ in found.merged() if count == 12] == [
        f"layers.0-11.{name}" for name in (*BLOCK[:3], "attn.kv", "attn.probs", *BLOCK[3:])
    ]


def test_depth_cuts_the_model_into_stacks():
    model = fbi.model.build(CONFIG, "layers.{0,-1}.*: w=none | layers.*: w=fbi")
    stacks = {name: tree for name, tree in model.abstract().items() if name.startswith("layers_")}
    assert list(stacks) == ["layers_0_1", "layers_1_3", "layers_3_4"]
    assert "q" not in stacks["layers_0_1"]["mlp"]["up"]
    assert {k: v.shape for k, v in stacks["layers_1_3"]["mlp"]["up"]["q"].items()} == dict.fromkeys(
        ("alpha", "beta"), (2, 8, 1)
    )
