"""QuEST: stable training from W1A1 to W8A8 (arXiv 2502.05003).

Questions: the order of methods at equal bits (table 1); what the Hadamard transform, the trust gradient and the clip
at 1 bit bring; what activations cost; loss against bits; the scaling law's efficiency of a bit-width on an own ladder.
Command: fbi sweep experiments/quest.py --launcher local:slots=2; then fbi report runs/quest
Expected: loss falls with bits; at 1 and 2 bits QuEST first, absmax STE last, the transform helps; 8 bits near full
precision. At 4 bits QuEST, QuaRot and the plain gradient are tied at this size: no order is claimed.
Cost: 56 runs of about a minute on one core. --scale paper: 30M to 800M on 3B to 80B tokens of C4; up to 50 GPU-days.
"""

import dataclasses

from experiments.mini import EXECUTION as EXECUTION
from experiments.mini import MINI, block, both, full_precision, policies, scaled
from fbi.experiment import grid, ladder, variants
from fbi.model.config import preset
from fbi.optim.config import OptimizerConfig
from fbi.report.spec import Claim, Figure, Line, Row, TableSpec
from fbi.train.run import Run

PAPER = "QuEST, 2502.05003"
# Table 1 and the authors' released runs: C4 validation, nats per token, the 30M model, by method and bits.
TABLE_1 = {
    "fp": {16: 3.207},
    "quest": {1: 3.945, 2: 3.574, 3: 3.372, 4: 3.272, 8: 3.209},
    "lsq": {1: 3.991, 2: 3.598, 3: 3.410, 4: 3.315},
    "quarot": {1: 4.932, 2: 4.481, 3: 3.612, 4: 3.338},
    "ste": {1: 5.256, 2: 4.793, 3: 4.449, 4: 3.792},
    "adabin": {1: 3.988},
    "quest-noht": {1: 3.9875, 2: 3.6772, 3: 3.4260, 4: 3.3036, 8: 3.2211},
    "quest-w": {1: 3.5727, 2: 3.3730, 3: 3.2956, 4: 3.2472},
}
# layers, width, peak rate and steps of 262,144 tokens: table 7
LADDER = {"30m": (1.2e-3, 11_444), "50m": (1.2e-3, 19_073), "100m": (6e-4, 38_146), "200m": (3e-4, 76_293),
          "430m": (1.5e-4, 164_031), "800m": (7.5e-5, 305_175)}  # fmt: skip
RUNGS = {f"l{layers}": dataclasses.replace(preset("nano"), layers=layers) for layers in (1, 4)}  # nano has 2
TOKENS_PER_PARAMETER = 1.25

METHODS = {
    "quest-w8a8": both("quest:bits=8"),
    "quest-w4a4": both("quest:bits=4"),
    "quest-w2a2": both("quest:bits=2"),
    "quest-w1a1": both("quest:bits=1"),
    "quest-w1": block("quest:bits=1"),
    "noht-w2a2": both("quest:bits=2,block=0"),
    "noht-w1a1": both("quest:bits=1,block=0"),
    "lsq-w2a2": both("lsq:bits=2"),
    "lsq-w1a1": both("lsq:bits=1"),
    "ste-w4a4": both("ste:bits=4"),
    "ste-w1a1": both("ste:bits=1"),
    "quarot-w1a1": both("quarot:bits=1"),
    "adabin-w1a1": both("adabin"),
    "identity-w1a1": both("quest:bits=1,surrogate=identity"),
    "noht-clip2-w1a1": both("quest:bits=1,block=0,clip=2"),
}


def runs() -> list[Run]:
    """The small scale: methods with three seeds, and a ladder of two more sizes with one."""
    rungs = grid(MINI, {"policy": {"fp": "fp", **{k: METHODS[k] for k in ("quest-w4a4", "quest-w2a2", "quest-w1a1")}}})
    return [*full_precision(), *policies(METHODS), *ladder(rungs, RUNGS, TOKENS_PER_PARAMETER)]


def paper() -> list[Run]:
    """Table 7's ladder at full precision and 1, 2, 3, 4, 8 bits."""
    optimizer = OptimizerConfig(warmup=0.1, final=0.1, weight_decay=0.1, decay="latent")
    base = scaled(MINI, corpus="text:c4-en", tokenizer="llama2/tokenizer.json", window=512, batch=512,
                  optimizer=optimizer)  # fmt: skip
    sizes = {size: {"model": preset(f"quest-{size}"), "optimizer.lr": lr, "steps": steps}
             for size, (lr, steps) in LADDER.items()}  # fmt: skip
    bits = {f"w{b}a{b}": both(f"quest:bits={b}") for b in (8, 4, 3, 2, 1)}
    return variants(grid(base, {"policy": {"fp": "fp", **bits}}), sizes)


def tables() -> list[TableSpec]:
    """Table 1's methods beside its numbers for 30M; ablations."""
    groups = (
        ("QuEST: methods at 1 bit, W1A1", 1, ("quest", "adabin", "lsq", "quarot", "ste")),
        ("QuEST: methods at 2 bits, W2A2", 2, ("quest", "lsq")),
        ("QuEST: methods at 4 bits, W4A4", 4, ("quest", "ste")),
    )
    methods = [
        TableSpec(title, [_fp(), *(Row(name, f"{name}-w{b}a{b}", TABLE_1[name][b], PAPER) for name in names)],
                  baseline="quest", published="published, 30M on C4")
        for title, b, names in groups
    ]  # fmt: skip
    rotated = [row for b in (1, 2) for row in (
        Row(f"{b} bits", f"quest-w{b}a{b}", TABLE_1["quest"][b], PAPER),
        Row(f"{b} bits, no Hadamard", f"noht-w{b}a{b}", TABLE_1["quest-noht"][b], PAPER),
    )]  # fmt: skip
    widths = [Row(f"W{b}A{b}", f"quest-w{b}a{b}", TABLE_1["quest"][b], PAPER) for b in (8, 4, 2, 1)]
    widths.append(Row("W1A16", "quest-w1", TABLE_1["quest-w"][1], PAPER))
    gradient = [
        Row("clip at 1.30, Hadamard (the paper's)", "quest-w1a1", 3.945, PAPER),
        Row("identity, Hadamard", "identity-w1a1"),
        Row("clip at 1.25, no Hadamard (the paper's)", "noht-w1a1", 3.9875, PAPER),
        Row("clip at 2.0, no Hadamard", "noht-clip2-w1a1"),
    ]
    return [
        *methods,
        TableSpec("QuEST: bit-widths", [_fp(), *widths], baseline="full precision", published="published, 30M on C4"),
        TableSpec("QuEST: the Hadamard transform", rotated, published="published, 30M on C4"),
        TableSpec("QuEST: the gradient at 1 bit", gradient, published="published, 30M on C4"),
    ]


def _fp() -> Row:
    return Row("full precision", "fp", TABLE_1["fp"][16], PAPER)


def claims() -> list[Claim]:
    """Orders that the paper prints and that short runs can resolve."""
    fp, one = "fp", "quest-w1a1"

    def order(text: str, low: tuple[str, int], high: tuple[str, int], source: str = "table 1") -> Claim:
        """Two cells of `TABLE_1`, given as (method, bits), the better one first."""
        gap = TABLE_1[high[0]][high[1]] - TABLE_1[low[0]][low[1]]
        return Claim(text, f"{PAPER}, {source}", _runs(*low), _runs(*high), published=f"{gap:+.3f}")

    released = "released runs"
    return [
        Claim("8 bits are as good as full precision (within 0.02 nats)", f"{PAPER}, {released}", fp, _runs("quest", 8),
              kind="equal", margin=0.02, published=f"{TABLE_1['quest'][8] - TABLE_1['fp'][16]:+.3f}"),
        order("8 bits beat 4", ("quest", 8), ("quest", 4), released),
        order("4 bits beat 2", ("quest", 4), ("quest", 2)),
        order("2 bits beat 1", ("quest", 2), ("quest", 1)),
        order("W1A1: QuEST beats AdaBin", ("quest", 1), ("adabin", 1)),
        order("W1A1: QuEST beats LSQ", ("quest", 1), ("lsq", 1)),
        order("W1A1: QuEST beats Hadamard + absmax (QuaRot)", ("quest", 1), ("quarot", 1)),
        order("W1A1: QuEST beats absmax + STE", ("quest", 1), ("ste", 1)),
        order("W2A2: QuEST beats LSQ", ("quest", 2), ("lsq", 2)),
        order("W4A4: QuEST beats absmax + STE", ("quest", 4), ("ste", 4)),
        order("W1A1: the Hadamard transform helps", ("quest", 1), ("quest-noht", 1), released),
        order("W2A2: the Hadamard transform helps", ("quest", 2), ("quest-noht", 2), released),
        order("1-bit weights alone cost less than W1A1", ("quest-w", 1), ("quest", 1), released),
        Claim("1 bit without Hadamard: a clip at 2.0 is worse than at 1.25", f"{PAPER}, {released}",
              _runs("quest-noht", 1), "noht-clip2-w1a1", published="+0.37"),
        Claim("1 bit with Hadamard: clipping the gradient beats the identity", PAPER, one,
              "identity-w1a1"),
    ]  # fmt: skip


def _runs(method: str, bits: int) -> str:
    """The runs that measure a cell of `TABLE_1`."""
    if method in ("fp", "quest-w"):
        return "fp" if method == "fp" else f"quest-w{bits}"
    return f"{method.replace('quest-noht', 'noht')}-w{bits}a{bits}"


def figures() -> list[Figure]:
    """Loss against bits and against memory."""
    lines = [Line("QuEST", "quest-w[1248]a[1248]"), Line("no Hadamard", "noht-w[12]a[12]"),
             Line("LSQ", "lsq-w*"), Line("QuaRot", "quarot-w*"), Line("absmax STE", "ste-w*")]  # fmt: skip
    rungs = [Line("full precision", "fp*"), *(Line(f"W{b}A{b}", f"quest-w{b}a{b}*") for b in (4, 2, 1))]
    return [
        Figure("bits", "Loss by bits of weights and activations", lines, x="summary.paper_bits_per_weight",
               x_label="bits per weight, as papers count", log_x=True),
        Figure("pareto", "Loss against the size of the whole model, 1, 2 and 4 layers", rungs,
               x="summary.stored_megabytes", x_label="stored size (MB)", log_x=True),
    ]  # fmt: skip
