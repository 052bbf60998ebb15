"""Text to training batches: corpus -> tokenizer -> windows, each made once and cached, then batches by step.

Nothing here needs JAX or TensorFlow; only `Batches` imports Grain, which loads JAX where it is installed.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fbi.data.config import DataConfig
    from fbi.data.loader import Batches
    from fbi.data.pipeline import prepare
    from fbi.data.registry import fetch
    from fbi.data.tokenizer import Tokenizer
    from fbi.data.windows import Windows

__all__ = ["Batches", "DataConfig", "Tokenizer", "Windows", "fetch", "prepare"]

_HOME = {
    "DataConfig": "config",
    "Batches": "loader",
    "prepare": "pipeline",
    "fetch": "registry",
    "Tokenizer": "tokenizer",
    "Windows": "windows",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fbi.data.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
