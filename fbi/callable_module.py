"""Modules that can be called: `fbi.policy` is a module and `fbi.policy("fbi")` its main function."""

from collections.abc import Callable
from types import ModuleType
from typing import Any


def make_callable(module: ModuleType, main: Callable[..., Any]) -> None:
    """Makes `module(...)` mean `main(...)`. Importing a submodule rebinds its name in the package, so that a function
    of the same name would be lost to whoever imports the submodule first; a callable module is both."""

    class CallableModule(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return main(*args, **kwargs)

    CallableModule.__call__.__doc__ = main.__doc__
    module.__class__ = CallableModule
