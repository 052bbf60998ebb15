"""Which quantizer each site of a model gets: ordered rules over site names, and a report of what matched.

    layers.{0,-1}.*: w=none | layers.*: w=bitnet-b158;a=absmax:bits=8

A rule is a glob over sites (`*` any text, `?` one character, `{a,b}` alternatives; negative layer numbers count from
the end) with a method for the weight, the activation, or both. The first match wins; a site that no rule matches stays
in full precision; a rule that matches nothing is an error. The key-value cache (`layers.3.attn.kv`) and the attention
probabilities (`layers.3.attn.probs`) are operands of no weight: only a glob that ends in their name matches them.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax

from fbi.errors import InputError, unknown
from fbi.lazy import make_callable
from fbi.quant import BitReport, Method, Quantizer

NONE = Method("none")
OPT_IN = ("kv", "probs")
NO_ACTIVATION = ("embed",)  # rows are looked up


class Site(NamedTuple):
    """A place in a model that may be quantized; `weight` is its [in, out] shape, None where there is no weight."""

    name: str
    weight: tuple[int, int] | None


@runtime_checkable
class HasSites(Protocol):
    """A model, as far as a policy needs to know it."""

    @property
    def sites(self) -> Sequence[Site]:
        """Every site, layer by layer."""
        ...


class Methods(NamedTuple):
    """What one site gets."""

    weight: Method = NONE
    activation: Method = NONE

    def build(self) -> tuple[Quantizer, Quantizer]:
        """The quantizers of weight and activation."""
        return self.weight.build("weight"), self.activation.build("activation")


@dataclasses.dataclass(frozen=True)
class Rule:
    """Sites that match `glob` get these methods."""

    glob: str
    methods: Methods

    @classmethod
    def parse(cls, text: str) -> "Rule":
        """Reads `glob: w=METHOD;a=METHOD`."""
        glob, colon, rest = text.partition(":")
        form = "write GLOB: w=METHOD;a=METHOD, as in 'layers.*: w=fbi'"
        if not colon or not glob.strip():
            raise InputError(f"policy rule {text.strip()!r} has no site or no methods; {form}")
        given: dict[str, Method] = {}
        for part in filter(None, (p.strip() for p in rest.split(";"))):
            operand, equals, method = part.partition("=")
            if not equals or operand.strip() not in ("w", "a"):
                raise InputError(f"policy rule {text.strip()!r}: {part!r} names neither w nor a; {form}")
            if operand.strip() in given:
                raise InputError(f"policy rule {text.strip()!r} gives {operand.strip()} twice; keep one")
            given[operand.strip()] = Method.parse(method)
        if not given:
            raise InputError(f"policy rule {text.strip()!r} gives no method; {form}")
        return cls(glob.strip(), Methods(given.get("w", NONE), given.get("a", NONE)))

    def __str__(self) -> str:
        parts = zip("wa", self.methods, strict=True)
        return f"{self.glob}: " + (";".join(f"{k}={m}" for k, m in parts if m != NONE) or "w=none")

    def check(self, sites: Sequence[Site]) -> None:
        """Refuses methods that do not fit the operand they are for, or that none of `sites` has a use for."""
        self.methods.weight.build("weight")
        self.methods.activation.build("activation")
        names = ", ".join(dict.fromkeys(site.name.rsplit(".", 1)[-1] for site in sites))
        if self.methods.weight != NONE and not any(site.weight for site in sites):
            raise InputError(f"policy rule '{self}': {names} has no weight of its own; give a, not w")
        if self.methods.activation != NONE and all(site.name in NO_ACTIVATION for site in sites):
            raise InputError(f"policy rule '{self}': {names} multiplies no activation; give w, not a")
        table = next((site.weight for site in sites if site.name == "embed"), None)
        if table and jax.eval_shape(self.methods.weight.build("weight").init, jax.ShapeDtypeStruct(table, "float32")):
            raise InputError(
                f"policy rule '{self}': the embedding keeps no learned scales, as {self.methods.weight} has; "
                "put the rule 'embed: w=none' before it"
            )

    def matches(self, site: str, layers: int) -> bool:
        """Whether this rule is for `site` of a model with that many layers."""
        last = site.rsplit(".", 1)[-1]
        if last in OPT_IN and not re.search(rf"(^|[.,{{]){last}(}}|,[^.]*}})?$", self.glob):
            return False
        names = [site]
        if found := re.match(r"layers\.(\d+)\.", site):
            names.append(f"layers.{int(found[1]) - layers}.{site[found.end() :]}")
        pattern = glob_pattern(self.glob)
        return any(pattern.fullmatch(name) for name in names)


def glob_pattern(glob: str) -> re.Pattern[str]:
    """The expression that a glob over dotted names stands for; an `InputError` for braces that do not pair."""
    special = {"*": ".*", "?": ".", "{": "(?:", "}": ")"}
    depth, out = 0, ""
    for char in glob:
        depth += {"{": 1, "}": -1}.get(char, 0)
        if depth < 0 or depth > 1:
            break
        out += "|" if char == "," and depth else special.get(char, re.escape(char))
    if depth != 0:
        raise InputError(f"glob {glob!r} has unbalanced or nested braces; write {{a,b}}")
    return re.compile(out)


@dataclasses.dataclass(frozen=True)
class Policy:
    """Ordered rules; the first that matches a site decides."""

    rules: tuple[Rule, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Policy":
        """Reads the name of a preset, or rules joined by ` | `."""
        if text.strip() in PRESETS:
            return cls.parse(PRESETS[text.strip()]) if PRESETS[text.strip()] else cls()
        if ":" not in text:
            raise unknown("policy", text.strip(), [*PRESETS, "GLOB: w=METHOD;a=METHOD | ..."])
        return cls(tuple(Rule.parse(part) for part in text.split("|")))

    def __str__(self) -> str:
        return " | ".join(map(str, self.rules)) or "fp"

    def at(self, site: str, layers: int) -> Methods:
        """The methods of `site` in a model with that many layers."""
        return next((rule.methods for rule in self.rules if rule.matches(site, layers)), Methods())

    def bind(self, sites: Sequence[Site], layers: int) -> dict[str, Methods]:
        """Site name -> methods; an `InputError` for a rule that decides nothing (unknown, misspelt or shadowed).

        Also for one whose methods cannot be what the rule makes them.
        """
        bound: dict[str, Methods] = {}
        decided: list[list[Site]] = [[] for _ in self.rules]
        for site in sites:
            index = next((i for i, rule in enumerate(self.rules) if rule.matches(site.name, layers)), None)
            if index is not None:
                decided[index].append(site)
                bound[site.name] = self.rules[index].methods
        for rule, taken in zip(self.rules, decided, strict=True):
            if taken:
                rule.check(taken)
            else:
                shadowed = any(rule.matches(site.name, layers) for site in sites)
                why = "earlier rules take every site it names" if shadowed else "no site has such a name"
                some = ", ".join(dict.fromkeys(re.sub(r"layers\.\d+", "layers.N", site.name) for site in sites))
                raise InputError(f"policy rule '{rule}' matches nothing: {why}; sites, N of 0..{layers - 1}: {some}")
        return bound

    def report(self, model: HasSites) -> "Report":
        """What every site of `model` gets and costs."""
        sites = model.sites
        layers = 1 + max((int(m[1]) for s in sites if (m := re.match(r"layers\.(\d+)\.", s.name))), default=-1)
        bound = self.bind(sites, layers)
        rows = []
        for site in sites:
            methods = bound.get(site.name, Methods())
            bits = methods.weight.build("weight").bits(site.weight) if site.weight else None
            rows.append(Row(site.name, site.weight, methods, bits))
        return Report(tuple(rows))


class Row(NamedTuple):
    """One site of a report."""

    site: str
    shape: tuple[int, int] | None
    methods: Methods
    bits: BitReport | None


@dataclasses.dataclass(frozen=True)
class Report:
    """Every site with its methods and the bits of its weight; `str()` is a table, equal neighbours in one row."""

    rows: tuple[Row, ...]

    @property
    def stored_bytes(self) -> int:
        """Bytes of all weights at sites, as a file holds them (norms come beside them)."""
        return sum(row.bits.stored for row in self.rows if row.bits)

    @property
    def quantized_bits(self) -> tuple[float, float] | None:
        """Paper and stored bits per weight over the quantized weights; None where there are none."""
        found = [row.bits for row in self.rows if row.bits and row.methods.weight != NONE]
        weights = sum(bits.weights for bits in found)
        if not weights:
            return None
        return sum(b.paper for b in found) / weights, 8 * sum(b.stored for b in found) / weights

    def merged(self) -> list[tuple[str, int, Row]]:
        """Rows whose layers differ in nothing else, as (`layers.0-11.attn.q`, 12, the first of them)."""
        runs: dict[tuple, list[tuple[int, Row]]] = {}
        for row in self.rows:
            found = re.match(r"layers\.(\d+)\.(.*)", row.site)
            layer, name = (int(found[1]), found[2]) if found else (0, row.site)
            open_runs = [
                k for k, v in runs.items() if k[:3] == (name, row.shape, row.methods) and v[-1][0] == layer - 1
            ]
            key = open_runs[0] if found and open_runs else (name, row.shape, row.methods, layer, bool(found))
            runs.setdefault(key, []).append((layer, row))
        merged = []
        for key, members in runs.items():
            first, last = members[0][0], members[-1][0]
            span = str(first) if first == last else f"{first}-{last}"
            merged.append((f"layers.{span}.{key[0]}" if key[4] else key[0], len(members), members[0][1]))
        return merged

    def __str__(self) -> str:
        head = ("site", "shape", "weight", "activation", "code bits", "paper bits", "stored bits", "MB")
        table: list[tuple[str, ...]] = [head]
        for name, count, row in self.merged():
            shape = "x".join(map(str, row.shape)) + (f" x{count}" if count > 1 else "") if row.shape else "-"
            bits = row.bits
            numbers = (
                (f"{bits.code:.3g}", f"{bits.paper_per_weight:.3f}", f"{bits.stored_per_weight:.3f}",
                 f"{count * bits.stored / 1e6:.3f}")
                if bits
                else ("-",) * 4
            )  # fmt: skip
            weight = str(row.methods.weight) if row.shape else "-"
            table.append((name, shape, weight, str(row.methods.activation), *numbers))
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(w) if i < 4 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in table
        ]
        quantized = self.quantized_bits
        total = f"all weights {self.stored_bytes / 1e6:.3f} MB stored"
        if quantized:
            total += f"; quantized weights {quantized[0]:.3f} paper bits, {quantized[1]:.3f} stored bits each"
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], total])


_BLOCK = "layers.*.attn.{q,k,v,o}: {m} | layers.*.mlp.*: {m}"
PRESETS: dict[str, str] = {
    "fp": "",
    # FBI-LLM (2407.07093): every linear layer of a block; embedding, head and norms in full precision, W1A16.
    "fbi": _BLOCK.replace("{m}", "w=fbi"),
    # BitNet b1.58 (2402.17764): ternary weights, 8-bit activations per token; embedding and head in full precision.
    "bitnet-b158": _BLOCK.replace("{m}", "w=bitnet-b158;a=absmax:bits=8"),
    # BitNet (2310.11453): binary weights, 8-bit activations.
    "bitnet-b1": _BLOCK.replace("{m}", "w=bitnet-b1;a=bitnet-b1"),
    # BitNet a4.8 (2411.04965), second stage: 4 bits into attention and MLP, the larger half of 8 bits into the output
    # projection, 8 bits into the down projection; with ReLU²-GLU (model.activation=relu2).
    "bitnet-a48": "layers.*.{attn.q,attn.k,attn.v,mlp.gate,mlp.up}: w=bitnet-b158;a=bitnet-a4 | "
    "layers.*.attn.o: w=bitnet-b158;a=bitnet-topk | layers.*.mlp.down: w=bitnet-b158;a=absmax:bits=8",
    # BitNet v2 (2504.18415), second stage: 4 bits everywhere, rotated into output and down projections.
    "bitnet-v2": "layers.*.{attn.o,mlp.down}: w=bitnet-b158;a=bitnet-v2 | "
    + _BLOCK.replace("{m}", "w=bitnet-b158;a=bitnet-a4"),
    # QuEST (2502.05003): W4A4; other widths by rules.
    "quest": _BLOCK.replace("{m}", "w=quest:bits=4;a=quest:bits=4"),
    # Weights only, for training from a pretrained model with a teacher (2402.11295, 2406.12311).
    "onebit": _BLOCK.replace("{m}", "w=onebit"),
    "binarymos": _BLOCK.replace("{m}", "w=binarymos"),
    # Fully binary transformers (2205.13016, 2203.06390): weights, activations and attention.
    "bit": "layers.*.attn.probs: a=bit:signed=false | " + _BLOCK.replace("{m}", "w=bit;a=bit"),
    "bibert": "layers.*.attn.probs: a=bibert | " + _BLOCK.replace("{m}", "w=bibert;a=bibert"),
}

make_callable(__name__, Policy.parse)
