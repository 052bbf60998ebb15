"""fbi: train, distil, sweep, tabulate and export low-bit language models in JAX.

    q = fbi.quantizer("fbi"); p = q.init(w); w_hat = q.apply(w, p); e = q.encode(w, p); fbi.decode(e); q.bits(w.shape)
    fbi.policy("bitnet-b158").report(fbi.model("fbi-130m"))
    result = fbi.train(fbi.Run(policy="fbi", steps=500), "runs/first")
    model, params, tokenizer = fbi.load("runs/first")

Importing this package imports nothing else: jax is loaded with the first name that needs it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fbi.lazy import lazy_names

if TYPE_CHECKING:
    from fbi.errors import InputError as InputError
    from fbi.model import build as _model
    from fbi.policy import Policy as _Policy
    from fbi.quant import Ctx as Ctx
    from fbi.quant import Method as Method
    from fbi.quant import decode as decode
    from fbi.quant import quantizer as quantizer
    from fbi.train import Execution as Execution
    from fbi.train import Result as Result
    from fbi.train import Run as Run
    from fbi.train import load as load
    from fbi.train import train as train

    policy, model = _Policy.parse, _model

_HOMES = {
    "quantizer": "fbi.quant",
    "decode": "fbi.quant",
    "Method": "fbi.quant",
    "Ctx": "fbi.quant",
    "load": "fbi.train",
    "Run": "fbi.train",
    "Execution": "fbi.train",
    "Result": "fbi.train",
    "InputError": "fbi.errors",
}
_MODULES = ("policy", "model", "train")  # modules that can be called
__all__ = [
    "Ctx",
    "Execution",
    "InputError",
    "Method",
    "Result",
    "Run",
    "decode",
    "load",
    "model",
    "policy",
    "quantizer",
    "train",
]


_find = lazy_names("fbi", _HOMES)


def __getattr__(name: str) -> Any:
    return importlib.import_module(f"fbi.{name}") if name in _MODULES else _find(name)


def __dir__() -> list[str]:
    return __all__
