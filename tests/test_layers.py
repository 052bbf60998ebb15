"""The shape of the package: who may import whom, one custom derivative, files of a length that can be read."""

import ast
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "fbi"
FILES = sorted(ROOT.rglob("*.py"))

# A part imports from those before it and from its neighbours in the same row.
ROWS = [
    {"errors", "lazy", "files", "fields"},
    {"quant"},
    {"policy"},
    {"model", "data"},
    {"serve"},
    {"loss"},
    {"optim"},
    {"evaluate", "analysis"},
    {"train"},
    {"experiment", "report", "demo", "launch"},
    {"preflight"},
    {"cli", "cli_preflight", "cli_report", "cli_sweep", "cli_tasks", "cli_teach", "console", "__main__"},
]
RANK = {part: rank for rank, row in enumerate(ROWS) for part in row}
BASE = ROWS[0]
MOST_LINES = 320


def part_of(path):
    """fbi/quant/ste.py -> quant; fbi/policy.py -> policy; fbi/__init__.py -> the empty name."""
    first = path.relative_to(ROOT).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def parts():
    """The first names below fbi: packages and modules."""
    return {part_of(path) for path in FILES} - {""}


def imports(tree):
    """(line, module) of every import of a file, wherever it stands, and of every module that it names in a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("fbi."):
            yield from [(node.lineno, node.value)] if node.value.replace(".", "").isidentifier() else []


def imported_parts(path):
    """(line, part of fbi) of every import from another part."""
    own = part_of(path)
    for line, module in imports(ast.parse(path.read_text())):
        head, _, rest = module.partition(".")
        if head == "fbi" and (part := rest.partition(".")[0]) != own:
            yield line, part


def allowed(path, part):
    """Whether this file may import that part."""
    own = part_of(path)
    if own == "":  # the names that users need, loaded on demand
        return True
    if own == "report":  # it reads files
        return part in BASE
    if {own, part} == {"model", "data"}:
        return own == "model" and path.name.startswith("convert")
    return part in RANK and RANK[part] <= RANK[own]


def test_every_part_has_a_place():
    assert parts() <= set(RANK)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_one_way(path):
    wrong = [f"line {line}: fbi.{part}" for line, part in imported_parts(path) if not allowed(path, part)]
    assert not wrong, f"{path.relative_to(ROOT)} may not import {', '.join(wrong)}"


def test_the_walk_sees_imports_wherever_they_stand():
    tree = ast.parse("""
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from fbi.train import Run as Run
def f():
    import fbi.model.config
    from fbi import optim
    return lazy("fbi.report.table"), "fbi.train RUN_DIR", "fbi"
""")
    found = {module for _, module in imports(tree) if module.startswith("fbi")}
    assert found == {"fbi.train.Run", "fbi.model.config", "fbi.optim", "fbi.report.table"}


@pytest.mark.parametrize(
    ("file", "part", "may"),
    [
        ("train/compose.py", "evaluate", True),
        ("train/compose.py", "experiment", False),
        ("train/compose.py", "analysis", True),
        ("analysis/sites.py", "model", True),
        ("analysis/diagnostics.py", "train", False),
        ("train/run.py", "report", False),
        ("train/run.py", "cli", False),
        ("quant/scale.py", "errors", True),
        ("quant/scale.py", "policy", False),
        ("policy.py", "quant", True),
        ("policy.py", "model", False),
        ("model/convert_gguf.py", "data", True),
        ("model/decoder.py", "data", False),
        ("data/windows.py", "model", False),
        ("report/table.py", "files", True),
        ("report/table.py", "quant", False),
        ("report/table.py", "train", False),
        ("report/table.py", "experiment", False),
        ("demo.py", "report", True),
        ("preflight/compile.py", "train", True),
        ("train/compose.py", "preflight", False),
        ("launch/outlay.py", "preflight", False),
        ("loss/logits.py", "model", True),
        ("serve/ffn.py", "model", True),
        ("model/mlp.py", "serve", False),
        ("model/decoder.py", "loss", False),
        ("files.py", "quant", False),
        ("cli.py", "train", True),
    ],
)
def test_the_rules_themselves(file, part, may):
    assert allowed(ROOT / file, part) is may


def test_no_part_imports_one_that_imports_it():
    edges = {own: set() for own in parts()}
    for path in FILES:
        if own := part_of(path):
            edges[own] |= {part for _, part in imported_parts(path)}
    cycles = [(a, b) for a, b in itertools.combinations(sorted(edges), 2) if b in edges[a] and a in edges[b]]
    assert cycles == []


def test_quant_needs_jax_alone():
    names = {
        module.partition(".")[0]
        for path in FILES
        if part_of(path) == "quant"
        for _, module in imports(ast.parse(path.read_text()))
    }
    assert names - set(sys.stdlib_module_names) <= {"jax", "jaxtyping", "numpy", "fbi"}


def test_quant_has_one_custom_derivative():
    found = [
        (path.name, node.attr)
        for path in FILES
        if part_of(path) == "quant"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("custom_vjp", "custom_jvp", "custom_gradient")
    ]
    assert found == [("ste.py", "custom_vjp")]


def test_no_file_is_too_long_to_read():
    long = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in FILES}
    assert {name: lines for name, lines in long.items() if lines > MOST_LINES} == {}


@pytest.mark.parametrize("module", ["fbi", "fbi.cli", "fbi.experiment", "fbi.report.table", "fbi.data", "fbi.train"])
def test_importing_loads_no_jax(module):
    program = (
        f"import sys, {module}\n"
        "heavy = {'jax', 'flax', 'optax', 'orbax', 'grain', 'tensorflow', 'tensorflow_datasets', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_public_name_is_there():
    import fbi

    assert all(getattr(fbi, name) is not None for name in dir(fbi))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fbi.nothing  # noqa: B018
    from fbi.train import load  # the function, also after its module of the same name was imported

    assert callable(load)
    assert callable(fbi.load)
