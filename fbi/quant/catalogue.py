"""Every registered method as one table, for people: `python -m fbi.quant.catalogue > docs/methods.md`."""

import jax
import jax.numpy as jnp

from fbi.quant.registry import REGISTRY, Entry, Method, allowed_text, listed

HEAD = """# Methods

Every registered method: what it is called in a policy, where it may stand, and the choices that make it. Written by
`make methods-doc` from the registry; do not edit. Where a published code differs from its paper, the paper's rule is
the default and the last column says so. Options are given as `name:option=value,option=value`.

`W`: weight [in, out], `A`: activation [..., in]. Losses and optimizer settings that belong to a method are configured
apart (`loss`, `optimizer`).

"""
COLUMNS = (
    "method", "on", "bits", "transform", "scale", "grid", "surrogate", "around the product, loss", "learned", "paper",
    "options", "published code",
)  # fmt: skip
WIDTH = 128


def _bits(name: str, entry: Entry) -> str:
    if "bits" in entry.options:
        return ", ".join(map(str, listed(entry.options["bits"])))
    code = Method(name).build(entry.roles[0]).bits((WIDTH, WIDTH)).code
    return f"{code:.3g}"


def _learned(name: str, entry: Entry) -> str:
    parts = []
    for role in entry.roles:
        q = Method(name).build(role)
        x = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)
        names = [*jax.eval_shape(q.init, x)]
        if role == "weight":
            names += jax.eval_shape(q.around.init, x, jax.eval_shape(lambda: jax.random.key(0)))
        if names:
            parts.append(f"{role[0].upper()}: {', '.join(names)}")
    return "; ".join(parts) or "none"


def _options(entry: Entry) -> str:
    shown = []
    for name, parameter in entry.options.items():
        allowed = "any surrogate" if name == "surrogate" and len(listed(parameter)) > 5 else allowed_text(parameter)
        default = f"{parameter.default:g}" if isinstance(parameter.default, float) else str(parameter.default)
        shown.append(f"`{name}`={default} ({allowed})")
    return "; ".join(shown) or "none"


def rows() -> list[tuple[str, ...]]:
    """One row a method, in order of registration; the cells of `COLUMNS`."""
    found = []
    for name, entry in REGISTRY.items():
        choices = entry.choices
        found.append((
            f"`{name}`", "+".join(role[0].upper() for role in entry.roles), _bits(name, entry), choices.transform,
            choices.scale, choices.grid, choices.surrogate, choices.around, _learned(name, entry), entry.paper,
            _options(entry), choices.notes or "agrees, or none",
        ))  # fmt: skip
    return found


def markdown() -> str:
    """The whole page."""
    lines = [" | ".join(COLUMNS), "|".join(["---"] * len(COLUMNS))]
    lines += [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows()]
    return HEAD + "\n".join(f"| {line} |" for line in lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
