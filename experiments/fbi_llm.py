"""FBI-LLM: fully binarized language models from scratch by autoregressive distillation (arXiv 2407.07093).

Questions: does distillation (AD) beat cross-entropy, and the mix of both? Is training from scratch as good as starting
from the full-precision weights, and calmer (flip-flop ratio, gradient norm)? Which granularity of the learned scales?
Command: fbi sweep experiments/fbi_llm.py --launcher local:slots=2; then fbi report runs/fbi_llm
Expected: AD below CE by 0.03 to 0.1 nats/token; the mix close to AD, perhaps below it; fewer flips from scratch.
Cost: 27 runs of about a minute on one core. --scale paper: 130M, 1.3B and 7B on one pass over 1.26T tokens; a pod.
"""

from experiments.mini import EXECUTION as EXECUTION
from experiments.mini import MINI, TEACHER, block, full_precision, mini, scaled
from fbi.experiment import variants
from fbi.model.config import preset
from fbi.optim.config import OptimizerConfig
from fbi.report.spec import Claim, Figure, Line, Row, TableSpec
from fbi.train.run import Run

PAPER = "FBI-LLM, 2407.07093"
# Table 2: perplexity on WikiText-2, PTB, C4 and the mean accuracy of seven tasks, of the fully binarized models.
TABLE_2 = {
    "130M": {"Wiki2": 28.2, "PTB": 136.6, "C4": 26.9, "average": 40.4},
    "1.3B": {"Wiki2": 12.6, "PTB": 39.3, "C4": 13.8, "average": 46.3},
    "7B": {"Wiki2": 9.1, "PTB": 29.6, "C4": 10.5, "average": 52.9},
}
# Sequences of 2,048 in a step (GPUs x sequences x accumulation), and steps of one pass over Amber's 360 chunks of
# 1,706,976 sequences; the published models may have stopped earlier.
SIZES = {"130m": ("fbi-130m", 1024), "1.3b": ("fbi-1.3b", 1152), "7b": ("fbi-7b", 1920)}
AMBER = 360 * 1_706_976


def runs() -> list[Run]:
    """The small scale: losses, starts and granularities."""
    students = {
        "fbi-ce": {"policy": "fbi"},
        "fbi-ad": {"policy": "fbi", "loss": "ad", "teacher": TEACHER},
        "fbi-mix": {"policy": "fbi", "loss": "0.5*ce + 0.5*ad", "teacher": TEACHER},
        "fbi-ad-pretrained": {"policy": "fbi", "loss": "ad", "teacher": TEACHER, "start": TEACHER},
        "fbi-output": {"policy": block("fbi:granularity=output")},
        "fbi-tensor": {"policy": block("fbi:granularity=tensor")},
        "fbi-noshift": {"policy": block("fbi:shift=false")},
        "fbi-tensor-noshift": {"policy": block("fbi:granularity=tensor,shift=false")},
    }
    return [*full_precision(), *mini(students)]


def paper() -> list[Run]:
    """The three published sizes, taught by Llama-2-7B; text and weights are named, not shipped."""
    optimizer = OptimizerConfig(
        lr=3e-4, warmup=2000.0, final=0.1, b1=0.9, b2=0.95, weight_decay=0.1, decay="everything"
    )
    base = scaled(MINI, corpus="text:amber", tokenizer="llama2/tokenizer.json", window=2048, optimizer=optimizer)
    sizes = {size: {"model": preset(model), "data.batch": batch, "steps": AMBER // batch}
             for size, (model, batch) in SIZES.items()}  # fmt: skip
    return variants(scaled(base, policy="fbi", loss="ad", teacher="runs/llama2-7b"), sizes)


def tables() -> list[TableSpec]:
    """Losses, starts, granularities."""
    students = {
        "full precision (teacher)": "fp",
        "binary, AD": "fbi-ad",
        "binary, CE": "fbi-ce",
        "binary, 0.5 CE + 0.5 AD": "fbi-mix",
        "binary, AD, from the teacher's weights": "fbi-ad-pretrained",
    }
    scales = {
        "per input feature (the paper's)": "fbi-ce",
        "per output": "fbi-output",
        "per matrix": "fbi-tensor",
        "per input feature, no shift": "fbi-noshift",
        "per matrix, no shift": "fbi-tensor-noshift",
    }
    flips = {"from scratch": "fbi-ad", "from the teacher's weights": "fbi-ad-pretrained"}
    return [
        TableSpec("FBI-LLM: losses", _rows(students), baseline="binary, CE",
                  note="the paper prints no loss of this comparison, only that AD is better on every measure"),
        TableSpec("FBI-LLM: granularity of the learned scales, CE", _rows(scales),
                  baseline="per input feature (the paper's)"),
        TableSpec("FBI-LLM: flip-flop ratio of latent weights between steps", _rows(flips), metric="diagnostics.flips",
                  unit="share"),
    ]  # fmt: skip


def _rows(named: dict[str, str]) -> list[Row]:
    return [Row(label, glob) for label, glob in named.items()]


def claims() -> list[Claim]:
    """What the paper says, seed by seed."""
    return [
        Claim("distillation (AD) beats cross-entropy", PAPER, "fbi-ad", "fbi-ce"),
        Claim("AD alone beats the mix of CE and AD", f"{PAPER}, as a digest has it", "fbi-ad", "fbi-mix"),
        Claim("from scratch no worse than from full-precision weights (within 0.02 nats)", PAPER,
              "fbi-ad", "fbi-ad-pretrained", kind="equal", margin=0.02),
        Claim("from scratch fewer signs flip than from full-precision weights", PAPER,
              "fbi-ad", "fbi-ad-pretrained", metric="diagnostics.flips"),
        Claim("from scratch the gradient norm is smaller", PAPER,
              "fbi-ad", "fbi-ad-pretrained", metric="train.grad_norm"),
        Claim("one bit costs quality: full precision is better", f"{PAPER}, table 2", "fp", "fbi-ad"),
    ]  # fmt: skip


def figures() -> list[Figure]:
    """Training curves of the losses; flips while training."""
    starts = [Line("from scratch", "fbi-ad"), Line("from the teacher's weights", "fbi-ad-pretrained")]
    return [
        Figure("gradient", "Gradient norm of a binarized student while it trains", starts, kind="curves",
               y="train.grad_norm", y_label="gradient norm before clipping"),
        Figure("flips", "Share of binary weights that flip in a step", starts, kind="curves", y="diagnostics.flips",
               y_label="flip-flop ratio"),
    ]  # fmt: skip
