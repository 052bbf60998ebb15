"""Every registered method, at every bit-width it supports, trained for a few steps on the same real text.

Question: does each method train at all inside a decoder, and in which order do they come? It is no ranking: one seed,
one learning rate for all, a model of half a million parameters.
Command: `make methods-table` (resumable: a finished run is not run again; `--only GLOB`, `--steps N`).
Expected: full precision first; losses fall with bits within a method; weight-only above weight-and-activation; sign
activations last. Cost: about 25 seconds a run on one core, half of it compilation; 119 runs.
"""

import argparse
import fnmatch
import re
import sys
from pathlib import Path

from fbi.data.config import DataConfig
from fbi.files import read_json, write_text
from fbi.model.config import preset
from fbi.optim.config import OptimizerConfig
from fbi.quant.registry import REGISTRY, Method, listed
from fbi.train.run import Execution, Run

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


def runs(steps: int = 300) -> list[Run]:
    """One run a method."""
    data = DataConfig(window=64, batch=4)
    optimizer = OptimizerConfig(lr=3e-3)
    return [
        Run(name=str(m), model=preset("nano"), policy=policy(m), data=data, optimizer=optimizer, steps=steps)
        for m in methods()
    ]


def directory_of(root: Path, run: Run) -> Path:
    """Where a run of this table lies."""
    return root / re.sub(r"[^\w.-]+", "_", run.name)


def table(root: Path, wanted: list[Run]) -> str:
    """The finished runs in order of their loss, as Markdown."""
    rows = []
    for run in wanted:
        directory = directory_of(root, run)
        if (directory / "done.json").exists():
            done, summary = read_json(directory / "done.json"), read_json(directory / "summary.json")
            entry = REGISTRY[Method.parse(run.name).name]
            operands = "+".join(role[0].upper() for role in entry.roles)
            grid = entry.choices.grid.replace("|", "\\|")
            rows.append((done["loss"], run, operands, summary["paper_bits_per_weight"], grid))
    rows.sort(key=lambda row: row[0])
    full = next((loss for loss, run, *_ in rows if run.name == "none"), None)
    lines = ["| method | on | paper bits | grid | nats/token | over full precision |", "|---|---|---|---|---|---|"]
    for loss, run, operands, bits, grid in rows:
        over = f"{loss - full:+.3f}" if full is not None else ""
        lines.append(f"| `{run.name}` | {operands} | {bits:.2f} | {grid} | {loss:.3f} | {over} |")
    return "\n".join(lines) + "\n"


MARK = "<!-- table -->\n"


def put(path: Path, text: str) -> None:
    """Writes the table into a file: between its two marks where it has them, so that the remarks around it stay."""
    parts = path.read_text().split(MARK) if path.exists() else []
    before, after = (parts[0], parts[2]) if len(parts) == 3 else ("", "")
    write_text(path, f"{before}{MARK}{text}{MARK}{after}")


def main(arguments: list[str] | None = None) -> int:
    """Trains what is not finished, one after the other, and writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each run")
    parser.add_argument("--only", default="*", help="glob over run names, such as 'quest*'")
    parser.add_argument("--root", type=Path, default=Path("runs/methods"), help="where the run directories lie")
    parser.add_argument("--out", type=Path, help="Markdown file that gets the table, between its marks")
    parser.add_argument("--share", default="1/1", help="K/N: only every N-th run from the K-th, for N processes")
    options = parser.parse_args(arguments)
    first, every = (int(part) for part in options.share.split("/"))
    import fbi

    chosen = [run for run in runs(options.steps) if fnmatch.fnmatch(run.name, options.only)]
    execution = Execution(eval_every=0, checkpoint_every=options.steps, log_every=50, unroll=1, keep_last=1)
    failed = []
    for run in chosen[first - 1 :: every]:
        try:
            fbi.train(run, directory_of(options.root, run), execution)
        except ValueError as error:  # one method's failure must not hide the others
            failed.append(f"{run.name}: {error}")
            print(failed[-1], file=sys.stderr)
    text = table(options.root, chosen)
    print(text)
    if options.out:
        put(options.out, text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
