"""LTE: language models that learn structured sparsity (Learn To be Efficient, arXiv 2402.06126), and what it beats.

Questions: what does FFN sparsity cost in perplexity, for LTE and for every baseline after as many steps; which of its
parts matter (grouping, separability, trained routers); does it compose with ternary and binary weights; which layers
skip?
Command: fbi sweep experiments/lte.py --launcher local:slots=2; then fbi report runs/lte. A part of it, with the runs
that it starts from: --only 'lte-50*', --only 'wanda-*'; all of one seed: --only '*-s0'.
Expected: perplexity rises with sparsity, slowly up to 50 %; static experts (Wanda) are worst at 70 %; without
separability thresholding breaks the model. At this size a pilot found LTE's routers no better than random ones, so that
no order of these two is expected: the paper's is asked of the runs. Seen: half of the experts cost LTE 0.12 nats,
random routers 0.09, the experts that matter 0.02 (docs/results/lte.md).
Cost: one run of about five minutes and 52 of about one, each on one core. --scale paper: LLaMA2-7B on WikiText-103,
fine-tuning 3 epochs, stages of 1; and SmolLM2-135M. About 2 GPU-days a sparsity on eight H100.

Every baseline starts from the same pretrained model and takes as many steps as LTE's stages 1 and 2 together. Named by
percent of FFN sparsity; a chain is NAME-soft (stage 1, or what comes first) and NAME.
"""

import dataclasses
import json
from pathlib import Path

from experiments.mini import MINI, scaled
from fbi.experiment import replace, seeds, variants
from fbi.model.config import preset
from fbi.optim.config import OptimizerConfig
from fbi.report.spec import Claim, Figure, Line, Row, TableSpec
from fbi.train.run import Execution, Run

PAPER = "LTE, 2402.06126"
PUBLISHED = json.loads((Path(__file__).parent / "data" / "lte.json").read_text())
GFLOPS = {name: row[2] for name, row in PUBLISHED["gflops_per_token"].items() if name not in ("what", "tasks")}
PERPLEXITY = {name: row[1] for name, row in PUBLISHED["wikitext_perplexity"].items() if name != "what"}

EXPERT, EXPERTS, SEEDS = 32, 20, 3
STAGE = 150  # steps of each of LTE's stages
PRETRAINING = 1200
SHARES = {"30": 0.3, "50": 0.5, "70": 0.7}
FINE_TUNING = OptimizerConfig(lr=1e-3, warmup=0.06, weight_decay=0.0)
BASE = dataclasses.replace(
    MINI,
    model=dataclasses.replace(preset("nano"), layers=3, ff=EXPERT * EXPERTS),
    optimizer=OptimizerConfig(lr=3e-3),
    steps=PRETRAINING,
    name="base",
)
# every stage reads text in another order: a model knows the batches by heart that it has just seen
TUNED = dataclasses.replace(
    BASE, name="run", optimizer=FINE_TUNING, start="@base", steps=STAGE, data=dataclasses.replace(BASE.data, seed=1)
)
LATER = {"data.seed": 2}
# An evaluation at step 0 is that after the run before: the loss before each stage is in the record.
EXECUTION = Execution(eval_every=100_000, checkpoint_every=100_000, keep_last=1, log_every=10, unroll=1)

LOSS = "ce + 0.5*efficiency + 0.02*separability"
# zeros that are frozen are counted, so that a dense model reports a sparsity of 0
STATIC = {"optimizer.freeze": "zeros", "steps": 2 * STAGE}


def top_k(share: float) -> int:
    """Experts that a token keeps."""
    return round((1 - share) * EXPERTS)


def experts(**fields: object) -> dict[str, object]:
    """Fields of the model of a run with experts."""
    return {"model.expert": EXPERT, **{f"model.{name}": value for name, value in fields.items()}}


def lte(name: str, share: float, **soft: object) -> dict[str, dict]:
    """Stage 1, then stage 2 from it; `soft` changes fields of both, the loss of stage 1 alone."""
    loss = soft.pop("loss", LOSS)
    shared = {**experts(), "sparsity": share, **soft}
    return {
        f"{name}-soft": {**shared, "loss": loss},
        name: {**shared, **LATER, "model.routing": "hard", "start": f"@{name}-soft-s{{seed}}"},
    }


def random(share: float) -> dict:
    """Routers that are never trained, as many experts for each token; the model adapts."""
    return {**experts(router="random", routing="hard", top_k=top_k(share)), "steps": 2 * STAGE}


def deja_vu(share: float) -> dict:
    """The model adapts to the experts that a predictor chooses, trained beside the model as it was."""
    fields = experts(router="low-rank", routing="hard", top_k=top_k(share))
    return {**fields, **LATER, "start": "@deja-vu-soft-s0"}


def wanda(share: float, pattern: str = "expert", criterion: str = "wanda") -> dict:
    """Weights that are taken away for good before the first step."""
    return {**STATIC, "pruning": f"{criterion}:sparsity={share},pattern={pattern}"}


def runs() -> list[Run]:
    """The small scale: at 50 % what claims are about with three seeds, else one."""
    half = SHARES["50"]
    thrice = {
        **lte("lte-50", half),
        "dense": STATIC,
        "random-50": random(half),
        "wanda-50": wanda(half),
    }
    once: dict[str, dict] = {
        "deja-vu-soft": {
            **experts(router="low-rank", routing="dense"),
            "loss": "prediction",
            "optimizer.lr": 3e-3,
        },
        "deja-vu-50": deja_vu(half),
        "moe-soft": {"model.activation": "relu"},
        "moe-50": {
            **experts(router="oracle", routing="hard", top_k=top_k(half), activation="relu"),
            **LATER,
            "start": "@moe-soft-s{seed}",
        },
        "oracle-50": {**experts(router="oracle", routing="hard", top_k=top_k(half)), "steps": 2 * STAGE},
        "noisy-50": {**experts(router="noisy", routing="softmax", top_k=top_k(half)), "steps": 2 * STAGE},
        "magnitude-50": wanda(half, criterion="magnitude"),
        "wanda-weights-50": wanda(half, "unstructured"),
        "wanda-2of4": {**STATIC, "pruning": "wanda:pattern=2:4"},
        **lte("random-groups-50", half, grouping="random"),
        **lte("coactivation-50", half, grouping="coactivation"),
        **lte("lambda0-50", half, loss="ce + 0.5*efficiency"),
        # as in docs/results, from when the guard watched separability too, which may rise by any amount
        **lte("lambda05-50", half, loss="ce + 0.5*efficiency + 0.5*separability", **{"guard.spike": 1e3}),
    }
    for percent in ("30", "70"):
        share = SHARES[percent]
        once |= lte(f"lte-{percent}", share)
        once |= {f"random-{percent}": random(share)}
    for percent, share in SHARES.items():  # a ReLU model, fine-tuned after the swap as MoEfication's
        soft, hard = lte(f"relu-{percent}", share, **{"model.activation": "relu"}).items()
        once |= dict([(soft[0], {**soft[1], "start": "@moe-soft-s{seed}"}), hard])
    once |= {"wanda-70": wanda(SHARES["70"]), "deja-vu-70": deja_vu(SHARES["70"])}
    for policy, name in (("bitnet-b158", "b158"), ("fbi", "fbi")):
        once |= {f"dense-{name}": {"policy": policy, "steps": 2 * STAGE}}
        once |= lte(f"lte-{name}-50", half, policy=policy)
    return [BASE, *seeds(variants(TUNED, thrice), SEEDS), *seeds(variants(TUNED, once), 1)]


def paper() -> list[Run]:
    """LLaMA2-7B and SmolLM2-135M on WikiText-103: fine-tuned, then dense or with experts of 32, stage by stage."""
    # the paper names neither schedule nor context: linear decay to 0, windows of 1,024; 118M tokens are an epoch
    epoch = 118_000_000 // (16 * 1024)
    optimizer = OptimizerConfig(lr=1.5e-5, schedule="wsd", decay_share=0.94, final=0.0, warmup=0.06, weight_decay=0.0)
    base = scaled(Run(policy="fp", optimizer=optimizer), corpus="text:wikitext-103", window=1024, batch=16)
    sizes = {
        "llama2-7b": {"model": preset("llama2-7b"), "start": "llama2", "data.tokenizer": "llama2/tokenizer.json"},
        "smollm2-135m": {
            "model": preset("smollm2-135m"),
            "start": "smollm2-135m",
            "data.tokenizer": "smollm2/tokenizer.json",
            "optimizer.lr": 1e-4,
        },
    }
    made = []
    for size, fields in sizes.items():
        (first,) = variants(dataclasses.replace(base, steps=3 * epoch), {size: fields})
        tuned = dataclasses.replace(first, start=f"@{size}", steps=epoch)
        made += [first, replace(dataclasses.replace(tuned, name=f"{size}-dense"), {"steps": 2 * epoch})]
        for percent, share in SHARES.items():
            name = f"{size}-lte-{percent}"
            soft, hard = lte(name, share, loss="ce + 0.5*efficiency + 0.5*separability").values()
            hard = {**hard, "start": f"@{name}-soft"}
            made += [
                replace(dataclasses.replace(tuned, name=n), fields)
                for n, fields in ((f"{name}-soft", soft), (name, hard))
            ]
    return made


def tables() -> list[TableSpec]:
    """What 50 % cost with every method, the paper's outlay beside it; ablations; widths of weights."""
    lte52 = f"{PAPER}, table 2: 52 % overall"
    wanda_source = f"{PAPER}, table 2: 50 %, calibrated on WikiText"
    methods = [
        Row("dense fine-tuning", "dense"),
        Row("LTE", "lte-50", PERPLEXITY["LTE"], lte52),
        Row("Deja Vu, fine-tuned", "deja-vu-50"),
        Row("MoEfication: ReLU, the experts that matter", "moe-50"),
        Row("the experts that matter, SwiGLU", "oracle-50"),
        Row("noisy top-k softmax", "noisy-50"),
        Row("random routers, top-k", "random-50"),
        Row("Wanda, experts", "wanda-50"),
        Row("magnitude, experts", "magnitude-50"),
        Row("Wanda, weights", "wanda-weights-50", PERPLEXITY["Wanda unstructured"], wanda_source),
        Row("Wanda, 2:4", "wanda-2of4", PERPLEXITY["Wanda 2:4"], wanda_source),
    ]
    quality = f"{PAPER}, table 1: at most 0.5 perplexity worse"
    skipped = [
        Row("full", "dense", GFLOPS["full"], quality),
        Row("Deja Vu", "deja-vu-50", GFLOPS["Deja Vu"], quality),
        Row("MoEfication", "moe-50", GFLOPS["R-LLaMA + MoEfication"], f"{quality}; ReLU-LLaMA"),
        Row("LTE", "lte-50", GFLOPS["LTE"], quality),
    ]
    ablations = [
        Row("k-means, lambda 0.02", "lte-50"),
        Row("random groups", "random-groups-50"),
        Row("groups by coactivation", "coactivation-50"),
        Row("lambda 0", "lambda0-50"),
        Row("lambda 0.5 (the paper's)", "lambda05-50"),
        Row("stage 1 alone, all experts weighed", "lte-50-soft"),
    ]
    shares = [Row(f"{p} %", f"lte-{p}") for p in SHARES]
    relu = [Row(f"ReLU, {p} %", f"relu-{p}") for p in SHARES]
    widths = [
        Row("16 bits, dense", "dense"),
        Row("16 bits, 50 %", "lte-50"),
        Row("b1.58, dense", "dense-b158"),
        Row("b1.58, 50 %", "lte-b158-50"),
        Row("fbi (1 bit), dense", "dense-fbi"),
        Row("fbi (1 bit), 50 %", "lte-fbi-50"),
    ]
    return [
        TableSpec("LTE and its baselines at 50 % FFN sparsity, equal steps", methods, metric="perplexity",
                  unit="perplexity", published="published, LLaMA-7B on WikiText-103", baseline="dense fine-tuning"),
        TableSpec("LTE: what is skipped", skipped, metric="eval.sparsity:last", unit="share of the FFN",
                  published="published GFLOPs/token, WikiText-103"),
        TableSpec("LTE: perplexity by sparsity", shares, metric="perplexity", unit="perplexity"),
        TableSpec("LTE: sparsity that was met, requested in percent", [*shares, *relu], metric="eval.sparsity:last",
                  unit="share of experts"),
        TableSpec("LTE: ablations at 50 %", ablations, baseline="k-means, lambda 0.02"),
        TableSpec("LTE and the width of weights", widths, baseline="16 bits, dense"),
    ]  # fmt: skip


def claims() -> list[Claim]:
    """What the paper says, in numbers where it prints them."""
    said = PUBLISHED["claims"]
    over = f"{PERPLEXITY['Wanda unstructured']} against {PERPLEXITY['LTE']} perplexity"

    def better(text: str, high: str, published: str = "a figure") -> Claim:
        return Claim(text, f"{PAPER}, section 5", "lte-50", high, published=published)

    return [
        Claim("50 % sparsity costs at most 5 % of the dense model's perplexity", f"{PAPER}, table 1", "dense",
              "lte-50", kind="equal", margin=0.0488, published="0.5 perplexity at 1.83x fewer FLOPs"),
        better("LTE beats random routers", "random-50", said["routers"]),
        better("LTE beats pruned experts (Wanda)", "wanda-50"),
        better("LTE beats pruned weights (Wanda, unstructured)", "wanda-weights-50", over),
        better("LTE beats Deja Vu with fine-tuning", "deja-vu-50"),
        better("LTE beats MoEfication", "moe-50"),
        better("LTE beats noisy top-k softmax", "noisy-50", said["routers"]),
        better("k-means beats random groups", "random-groups-50", said["grouping"]),
        Claim("k-means and coactivation are alike (within 0.02 nats)", f"{PAPER}, section 5", "lte-50",
              "coactivation-50", kind="equal", margin=0.02, published=said["grouping"]),
        better("separability helps", "lambda0-50", said["separability"]),
        Claim("30 % costs less than 70 %", f"{PAPER}, section 5", "lte-30", "lte-70", published="a figure"),
        Claim("50 % cost b1.58 no more than 5 % of perplexity", "not in the paper", "dense-b158", "lte-b158-50",
              kind="equal", margin=0.0488),
    ]  # fmt: skip


def figures() -> list[Figure]:
    """Perplexity against sparsity; sparsity by layer; the sparsity of batches that are decoded together."""
    shares = [
        Line("dense", "dense"),
        Line("LTE", "|".join(f"lte-{p}" for p in SHARES)),
        Line("Deja Vu", "deja-vu-50|deja-vu-70"),
        Line("random routers", "|".join(f"random-{p}" for p in SHARES)),
        Line("Wanda, experts", "wanda-50|wanda-70"),
        Line("Wanda, weights", "wanda-weights-50|wanda-2of4"),
        Line("MoEfication", "moe-50"),
        Line("noisy top-k", "noisy-50"),
    ]
    met = "FFN sparsity, held-out text"
    bits = [
        Line("16 bits", "|".join(f"lte-{p}" for p in SHARES)),
        Line("b1.58", "lte-b158-50"),
        Line("fbi (1 bit)", "lte-fbi-50"),
    ]
    layers = [Line(f"LTE, {p} %", f"lte-{p}") for p in SHARES]
    return [
        Figure("perplexity", "What FFN sparsity costs, after equal steps", shares, x="eval.sparsity:last", x_label=met,
               y="perplexity", y_label="validation perplexity"),
        Figure("layers", "Sparsity by layer", layers, kind="layers", y="routing.sparsity", y_label=met),
        Figure("bits", "Loss by the bits of weights that a token reads", bits, x="eval.active_bits_per_weight:last",
               x_label="active bits for each weight of the blocks, routers included"),
        Figure("union", "Experts that all of 16 tokens skip", shares[1:4], x="eval.sparsity:last", x_label=met,
               y="routing.union_16:last", y_label="share of experts"),
    ]  # fmt: skip
