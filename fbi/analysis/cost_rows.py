"""The cost of a model as rows and lines, for a table."""

from fbi.analysis.active import token_bits
from fbi.analysis.cost import Cost, cost
from fbi.policy import Policy

COLUMNS = (
    ("product", ""), ("products", "d"), ("GMAC", ",.3f"), ("w bits", ".3g"), ("a bits", ".3g"), ("G bit-ops", ",.3f"),
    ("mJ, 45 nm", ",.4f"), ("mJ, 7 nm", ",.4f"),
)  # fmt: skip


def rows(found: Cost) -> list[list[str | int | float | None]]:
    """A row for each kind of product and one of all, under `COLUMNS`."""
    table: list[list[str | int | float | None]] = [
        [p.site, p.times, p.macs / 1e9, p.weight_bits, p.activation_bits, p.bit_operations / 1e9,
         *(1e3 * p.energy[nm].total for nm in (45, 7))]
        for p in found.products
    ]  # fmt: skip
    count = sum(p.times for p in found.products)
    energies = [1e3 * found.energy(nm).total for nm in (45, 7)]
    return [*table, ["all", count, found.macs / 1e9, None, None, found.bit_operations / 1e9, *energies]]


def notes(found: Cost) -> list[str]:
    """What the table leaves unsaid: size, operations, energy beside full precision, memory, what is not counted."""
    plain, memory = cost(found.config, Policy(), found.tokens, sparsity=found.sparsity), found.memory
    mega = lambda n: f"{n / 1e6:,.2f} MB"  # noqa: E731
    ratios = ", ".join(f"{plain.energy(nm).total / found.energy(nm).total:.1f}x at {nm} nm" for nm in (45, 7))
    split = found.energy(7)
    lines = [
        f"size: {mega(found.paper_bytes)} as papers print it, {mega(found.stored_bytes)} as a file holds it "
        f"({plain.paper_bytes / found.paper_bytes:.2f}x smaller than 16 bits in print)",
        f"operations: {found.operations / 1e9:,.3f} G = multiply-adds in full precision + bit-operations / 64 "
        f"(full precision {plain.operations / 1e9:,.3f} G)",
        f"energy: arithmetic alone, data movement is left out; {1e3 * split.add:,.3f} mJ of additions and "
        f"{1e3 * split.mul:,.3f} mJ of multiplications at 7 nm; FP16 takes {ratios} as much",
        f"training, bytes from shapes: parameters {mega(memory.parameters)}, gradients {mega(memory.gradients)}, "
        f"optimizer {mega(memory.optimizer)}; of each sequence: activations {mega(memory.activations)}, "
        f"logits {mega(memory.logits)}",
    ]
    if quantized := found.report.quantized_bits:
        lines.insert(1, f"quantized weights: {quantized[0]:.3f} bits each in print, {quantized[1]:.3f} in a file")
    if found.config.expert:
        (paper, stored), whole = found.token_bits.per_weight, token_bits(found.config, found.policy).per_weight
        lines.append(
            f"experts: {found.config.experts} of {found.config.expert} neurons a layer, of which a token skips "
            f"{100 * found.sparsity:.3g} %; routers make {100 * found.router_share:.2f} % of the multiply-adds of "
            f"dense MLPs; a token reads {paper:.3f} bits for each weight of the blocks in print, {stored:.3f} in a "
            f"file, routers included ({whole[0]:.3f} and {whole[1]:.3f} are stored)"
        )
    return lines
