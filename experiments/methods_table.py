"""Every registered method, at every bit-width it supports, trained for a few steps on the same real text.

Question: does each method train at all inside a decoder, and where does it lie in loss against stored bits? It is no
ranking: one seed, one learning rate for all, a model of half a million parameters.
Command: `make methods-table`, which is fbi sweep experiments/methods_table.py --launcher local:slots=2, then this file;
a finished run is not run again.
Expected: losses fall with bits within a method; sign activations last; methods with one scale for the whole matrix
learn fastest at this rate. Cost: about 25 seconds a run on one core, half of it compilation; 119 runs.
"""

import sys
from pathlib import Path

from fbi.data.config import DataConfig
from fbi.files import make_directory, write_text
from fbi.model.config import preset
from fbi.optim.config import OptimizerConfig
from fbi.quant.registry import REGISTRY, Method, listed
from fbi.report.measure import Found, measure, select
from fbi.report.spec import Figure, Line, Row, TableSpec
from fbi.report.sweep import read
from fbi.report.sweep_plot import draw
from fbi.train.run import Execution, Run

EXECUTION = Execution(eval_every=0, checkpoint_every=300, log_every=50, unroll=1, keep_last=1)
LINEAR = "layers.*.attn.{{q,k,v,o}}: {m} | layers.*.mlp.*: {m}"
# Methods whose place is not every linear layer, by name: the policy they are meant for.
PLACES = {
    "bitnet-topk": "layers.*.attn.o: w=bitnet-b158;a={a}",
    "bitnet-v2": "layers.*.attn.o: w=bitnet-b158;a={a} | layers.*.mlp.down: w=bitnet-b158;a={a} | "
    + LINEAR.format(m="w=bitnet-b158;a=bitnet-a4"),
    "bitnet-kv": "layers.*.attn.kv: a={a}",
    "bibert": "layers.*.attn.probs: a={a} | " + LINEAR.format(m="w={a};a={a}"),
    "bit": "layers.*.attn.probs: a={a}:signed=false | " + LINEAR.format(m="w={a};a={a}"),
}


def policy(method: Method) -> str:
    """The policy that puts a method where it is meant to be: on weights and activations where it can be both."""
    if method.name in PLACES:
        return PLACES[method.name].replace("{a}", str(method))
    if method.name == "none":
        return "fp"
    operands = [f"{operand}={method}" for operand, role in (("w", "weight"), ("a", "activation"))
                if role in REGISTRY[method.name].roles]  # fmt: skip
    return LINEAR.format(m=";".join(operands))


def methods() -> list[Method]:
    """Each method at each bit-width, as it stands otherwise."""
    found = []
    for name, entry in REGISTRY.items():
        bits = listed(entry.options["bits"]) if "bits" in entry.options else (None,)
        found += [Method(name) if b is None else Method(name, bits=b) for b in bits]
    usual = lambda m: {"bits": REGISTRY[m.name].options["bits"].default} if m.options else {}  # noqa: E731
    # Each method at its usual width comes first, the widths that tell least come last.
    return sorted(found, key=lambda m: (dict(m.options) != usual(m), dict(m.options).get("bits") in (5, 6, 7)))


def runs() -> list[Run]:
    """One run a method."""
    data = DataConfig(window=64, batch=4)
    optimizer = OptimizerConfig(lr=3e-3)
    return [
        Run(name=str(m), model=preset("nano"), policy=policy(m), data=data, optimizer=optimizer, steps=300)
        for m in methods()
    ]


def tables() -> list[TableSpec]:
    """A row a method."""
    rows = [Row(str(method), str(method)) for method in methods()]
    return [TableSpec("Every method, 300 steps", rows, baseline="none")]


def figures() -> list[Figure]:
    """The picture of all methods, each at its usual width and the widths that it names otherwise."""
    kinds: dict[str, list[str]] = {}
    for method in methods():
        roles = REGISTRY[method.name].roles
        label = "weights and activations" if len(roles) == 2 else f"{roles[0]}s alone"
        kinds.setdefault(label, []).append(str(method))
    lines = [Line(label, "|".join(names)) for label, names in kinds.items()]
    return [Figure("methods", "Loss against stored bits, every method at every width", lines, kind="scatter",
                   x_label="stored bits per weight of the blocks", log_x=True)]  # fmt: skip


def table(found: list[Found]) -> str:
    """The finished runs in order of their loss, as Markdown."""
    rows = []
    for method in methods():
        for run in select(found, str(method)):
            loss, bits = measure(run.record, "loss"), measure(run.record, "summary.paper_bits_per_weight")
            if loss is not None and bits is not None:
                rows.append((loss, bits, str(method), REGISTRY[method.name]))
    full = next((loss for loss, _, name, _ in rows if name == "none"), None)
    lines = ["| method | on | paper bits | grid | nats/token | over full precision |", "|---|---|---|---|---|---|"]
    for loss, bits, name, entry in sorted(rows, key=lambda row: row[0]):
        operands, grid = "+".join(role[0].upper() for role in entry.roles), entry.choices.grid.replace("|", "\\|")
        over = f"{loss - full:+.3f}" if full is not None else ""
        lines.append(f"| `{name}` | {operands} | {bits:.2f} | {grid} | {loss:.3f} | {over} |")
    return "\n".join([*lines, "", f"{len(rows)} of {len(methods())} runs are finished."]) + "\n"


MARK = "<!-- table -->\n"


def put(path: Path, text: str) -> None:
    """Writes the table into a file: between its two marks where it has them, so that the remarks around it stay."""
    parts = path.read_text().split(MARK) if path.exists() else []
    before, after = (parts[0], parts[2]) if len(parts) == 3 else ("", "")
    write_text(path, f"{before}{MARK}{text}{MARK}{after}")


def main(root: Path = Path("runs/methods_table"), out: Path = Path("docs")) -> None:
    """Writes the table and the picture of what is finished."""
    (results,) = read(root)
    put(out / "methods-table.md", table(list(results.found)))
    (figure,) = results.sweep.figures
    draw(figure, results.found, make_directory(out) / "methods-table.png")


if __name__ == "__main__":
    sys.exit(main())
