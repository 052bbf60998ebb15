"""The survey's question of the backward pass: which surrogate derivative of the sign, all else equal?

Question: with one forward pass (the sign of the weights times their mean magnitude per output, W1A16), do the
surrogates made for binary networks beat the plain straight-through estimator in a decoder that learns from text?
Command: fbi sweep experiments/survey.py --launcher local:slots=2; then fbi report runs/survey. The picture of all
methods of the library at equal steps is `make methods-table`.
Expected: small differences; the papers' gains are on images, with convolutions and activations binarized as well.
Cost: 21 runs of about a minute on one core.
"""

from experiments.mini import EXECUTION as EXECUTION
from experiments.mini import block, full_precision, policies
from fbi.report.spec import Claim, Figure, Line, Row, TableSpec
from fbi.train.run import Run

SURROGATES = {
    "identity": "straight-through estimator, 1308.3432",
    "clip": "hard tanh, BNN, 1602.02830",
    "tanh": "tanh, OneBit, 2402.11295",
    "swishsign": "SwishSign, BNN+, 1812.11800",
    "ede": "EDE, IR-Net, 1909.10788",
    "reste": "ReSTE, 2308.06689",
}


def runs() -> list[Run]:
    """One forward pass, six derivatives."""
    carried = {name: block(f"reste:surrogate={name}") for name in SURROGATES}
    return [*full_precision(), *policies(carried)]


def tables() -> list[TableSpec]:
    """Losses by surrogate."""
    rows = [Row(source, name) for name, source in SURROGATES.items()]
    return [TableSpec("Surrogates of the sign, W1A16", [Row("full precision", "fp"), *rows],
                      baseline=SURROGATES["clip"])]  # fmt: skip


def claims() -> list[Claim]:
    """Each paper's gain over the clipped straight-through estimator, and that estimator's over the plain one."""
    return [
        Claim("SwishSign beats the clipped estimator", SURROGATES["swishsign"], "swishsign", "clip"),
        Claim("EDE beats the clipped estimator", SURROGATES["ede"], "ede", "clip"),
        Claim("ReSTE beats the clipped estimator", SURROGATES["reste"], "reste", "clip"),
        Claim("tanh beats the clipped estimator", SURROGATES["tanh"], "tanh", "clip"),
        Claim("clipping beats the identity", SURROGATES["clip"], "clip", "identity"),
    ]


def figures() -> list[Figure]:
    """Curves by surrogate."""
    lines = [Line(name, name) for name in SURROGATES]
    return [Figure("surrogates", "Training loss by surrogate of the sign", lines, kind="curves", y="train.loss",
                   y_label="training loss (nats/token)")]  # fmt: skip
