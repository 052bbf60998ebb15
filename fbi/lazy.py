"""Packages that load on demand and that can be called: `import fbi` costs nothing, `fbi.policy("fbi")` works."""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def lazy_names(package: str, homes: dict[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose public names live in the modules `homes[name]`."""

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(homes)}")
        return getattr(importlib.import_module(homes[name]), name)

    return find


def make_callable(package: str, main: Callable[..., Any]) -> None:
    """Makes calling the module `package` mean calling `main`.

    Importing a submodule binds its name in the parent package, so that a function of that name would be lost to whoever
    imports the submodule first; a callable module is both.
    """

    class CallableModule(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return main(*args, **kwargs)

    CallableModule.__call__.__doc__ = main.__doc__
    sys.modules[package].__class__ = CallableModule
