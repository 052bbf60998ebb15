"""The BitNet family against full precision: b1, b1.58, a4.8, v2 (2310.11453, 2402.17764, 2411.04965, 2504.18415).

Questions: the order of the family at equal steps; where the norm should stand; what 4-bit activations do with and
without rotation; two stages of rate and decay against one cosine.
Command: fbi sweep experiments/bitnet.py --launcher local:slots=2; then fbi report runs/bitnet; sizes and energies
without training: fbi cost bitnet-3b --policy bitnet-b158
Expected: full precision first, b1.58 below b1, 4-bit activations close behind b1.58; at this size the gap of b1.58 to
full precision is still open, as it is at 700M in the paper.
Cost: 24 runs of about a minute on one core. --scale paper: 700M to 3B on 100B tokens.
"""

from experiments.mini import EXECUTION as EXECUTION
from experiments.mini import MINI, block, full_precision, mini, scaled
from fbi.experiment import variants
from fbi.model.config import preset
from fbi.optim.config import OptimizerConfig
from fbi.report.spec import Claim, Figure, Line, Row, TableSpec
from fbi.train.run import Run

B158, B1 = "BitNet b1.58, 2402.17764", "BitNet, 2310.11453"
A48, V2 = "BitNet a4.8, 2411.04965", "BitNet v2, 2504.18415"
# C4 perplexity of 700M after 100B tokens: a4.8's table 1; of 400M: v2's table 1
PERPLEXITY_700M = {"fp": 11.44, "b158": 12.32, "a48": 12.40}
PERPLEXITY_400M = {"b158": 13.37, "a48": 13.61, "v2": 13.78}
# peak rates of the two stages (a4.8, appendix), tokens in a step: 1M of 2,048
SIZES = {"700m": ("bitnet-700m", 1.5e-3, 1e-3), "1.3b": ("bitnet-1.3b", 1.2e-3, 8e-4),
         "3b": ("bitnet-3b", 1.2e-3, 6.4e-4)}  # fmt: skip
STEPS, SEQUENCES = 95_367, 512  # 100B tokens in steps of 1,048,576


def runs() -> list[Run]:
    """The small scale."""
    native = block("bitnet-b158", "bitnet-a4")
    variants_of = {
        "b1": {"policy": "bitnet-b1"},
        "b158": {"policy": "bitnet-b158"},
        "b158-sub": {"policy": "bitnet-b158", "model.norm": "sub"},
        "b158-two-stage": {"policy": "bitnet-b158", "optimizer.schedule": "two-stage", "optimizer.second_lr": 2e-3},
        "a48": {"policy": "bitnet-a48", "model.activation": "relu2"},
        "v2": {"policy": "bitnet-v2"},
        "native-a4": {"policy": native},
    }
    return [*full_precision(), *mini(variants_of)]


def paper() -> list[Run]:
    """b1.58 and its full-precision twin at three published sizes."""
    optimizer = OptimizerConfig(schedule="two-stage", b1=0.9, b2=0.95, warmup=375.0, weight_decay=0.1)
    base = scaled(MINI, corpus="text:redpajama", tokenizer="llama2/tokenizer.json", window=2048, batch=SEQUENCES,
                  steps=STEPS, optimizer=optimizer)  # fmt: skip
    sizes = {size: {"model": preset(name), "optimizer.lr": first, "optimizer.second_lr": second}
             for size, (name, first, second) in SIZES.items()}  # fmt: skip
    return variants(variants(base, {"b158": {"policy": "bitnet-b158"}}), sizes)


def tables() -> list[TableSpec]:
    """The family, and where its norm stands."""
    family = [
        Row("full precision", "fp", PERPLEXITY_700M["fp"], A48),
        Row("b1.58, W1.58A8", "b158", PERPLEXITY_700M["b158"], A48),
        Row("a4.8, W1.58A4", "a48", PERPLEXITY_700M["a48"], A48),
        Row("v2, W1.58A4", "v2", PERPLEXITY_400M["v2"], f"{V2}, 400M (b1.58 there: {PERPLEXITY_400M['b158']})"),
        Row("4 bits everywhere, no rotation", "native-a4", None, f"{V2}: diverges at 1.3B and 3B"),
        Row("b1, W1A8", "b1"),
    ]
    norms = [Row("before attention and MLP", "b158"), Row("and before o and down (SubLN)", "b158-sub")]
    stages = [Row("one cosine", "b158"), Row("two stages of rate and decay", "b158-two-stage")]
    return [
        TableSpec("BitNet: the family", family, baseline="full precision",
                  published="published C4 perplexity, 700M"),
        TableSpec("BitNet b1.58: placement of the norm", norms, baseline="before attention and MLP"),
        TableSpec("BitNet b1.58: schedule", stages, baseline="one cosine"),
    ]  # fmt: skip


def claims() -> list[Claim]:
    """Orders within the family."""
    return [
        Claim("at small size full precision is better than b1.58", f"{B158}, table 1 (700M)", "fp", "b158",
              published=f"perplexity {PERPLEXITY_700M['fp']} against {PERPLEXITY_700M['b158']}"),
        Claim("ternary weights beat binary ones", B158, "b158", "b1"),
        Claim("a4.8 is as good as b1.58 (within 0.03 nats)", f"{A48}, table 1", "b158", "a48", kind="equal",
              margin=0.03, published=f"perplexity {PERPLEXITY_700M['b158']} against {PERPLEXITY_700M['a48']}"),
        Claim("v2 with 4 bits is close to b1.58 (within 0.05 nats)", f"{V2}, table 1", "b158", "v2",
              kind="equal", margin=0.05,
              published=f"perplexity {PERPLEXITY_400M['b158']} against {PERPLEXITY_400M['v2']}"),
        Claim("4-bit activations everywhere need the rotation", f"{V2}, table 5", "v2", "native-a4",
              published="diverges without"),
        Claim("SubLN beats the norm before the block alone", f"{B1}, ablation", "b158-sub", "b158",
              published="perplexity 20.34 against 22.11 (b1)"),
        Claim("two stages of rate and decay beat one cosine", "The Era of 1-bit LLMs: training tips",
              "b158-two-stage", "b158"),
    ]  # fmt: skip


def figures() -> list[Figure]:
    """Curves of the family."""
    lines = [Line("full precision", "fp"), Line("b1.58", "b158"), Line("b1", "b1"), Line("a4.8", "a48"),
             Line("v2, 4 bits", "v2"), Line("4 bits, no rotation", "native-a4")]  # fmt: skip
    return [Figure("family", "Training loss of the BitNet family", lines, kind="curves", y="train.loss",
                   y_label="training loss (nats/token)")]  # fmt: skip
