"""The diagnostics that a run may ask for. Imports no jax."""

from fbi.errors import unknown

NAMES = ("flips", "entropy", "margin", "error", "masked", "activations", "alignment")


def parse(text: str) -> tuple[str, ...]:
    """Reads `flips,entropy`: names in the order given, each once; an `InputError` that lists the valid ones."""
    names = tuple(dict.fromkeys(filter(None, (part.strip() for part in text.split(",")))))
    for name in names:
        if name not in NAMES:
            raise unknown("diagnostic", name, NAMES)
    return names
