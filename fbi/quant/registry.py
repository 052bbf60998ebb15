"""Methods by name: text and data in, quantizers out; unknown names and options are errors that list the valid ones."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from fbi.errors import InputError, unknown
from fbi.quant.quantizer import Quantizer

Role = Literal["weight", "activation"]
CONTRACTION_AXIS: dict[str, int] = {"weight": 0, "activation": -1}
Option = bool | int | float | str


class Choices(NamedTuple):
    """The choices that make a method, in words, for the table of methods."""

    scale: str
    grid: str
    surrogate: str
    transform: str = "none"
    around: str = "none"
    """What the method adds around the product, or expects of the loss."""
    notes: str = ""
    """Where the published code differs from the paper, and what was decided."""


class Entry(NamedTuple):
    """One row of the registry."""

    build: Callable[..., Quantizer]
    roles: tuple[str, ...]
    paper: str
    choices: Choices
    options: dict[str, inspect.Parameter]

    @property
    def summary(self) -> str:
        """The first line of the method's docstring."""
        return (inspect.getdoc(self.build) or "").splitlines()[0]


REGISTRY: dict[str, Entry] = {}


BOTH, WEIGHT, ACTIVATION = ("weight", "activation"), ("weight",), ("activation",)


def method(
    name: str, *, roles: tuple[str, ...], paper: str, choices: Choices
) -> Callable[[Callable[..., Quantizer]], Callable[..., Quantizer]]:
    """Registers `build(role, **options) -> Quantizer` under `name`; its keyword defaults are the options."""

    def register(build: Callable[..., Quantizer]) -> Callable[..., Quantizer]:
        options = {k: p for k, p in inspect.signature(build).parameters.items() if p.kind is p.KEYWORD_ONLY}
        REGISTRY[name] = Entry(build, roles, paper, choices, options)
        return build

    return register


def listed(parameter: inspect.Parameter) -> tuple[Option, ...]:
    """The values that an option may take, where they are listed: Literal[...], or Annotated[float, (values)]."""
    annotation = parameter.annotation
    if get_origin(annotation) is Annotated:
        return annotation.__metadata__[0]
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def allowed_text(parameter: inspect.Parameter) -> str:
    """The values that an option accepts, for a message or a table."""
    return "|".join(map(str, listed(parameter))) or parameter.annotation.__name__


def _checked(name: str, option: str, value: Option, parameter: inspect.Parameter) -> Option:
    annotation = parameter.annotation
    if listed(parameter):
        valid = value in listed(parameter) and not isinstance(value, bool)
    elif annotation is float:
        valid = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        valid = isinstance(value, annotation) and (annotation is bool or not isinstance(value, bool))
    if not valid:
        allowed = allowed_text(parameter)
        raise InputError(f"option {option}={value!r} of method {name!r} is not valid; allowed: {allowed}")
    return value


def _value(text: str) -> Option:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _text(value: Option) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclasses.dataclass(frozen=True, init=False)
class Method:
    """A method by name and options, as data: `Method("absmax", bits=4)`, or the text `absmax:bits=4`."""

    name: str
    options: tuple[tuple[str, Option], ...]

    def __init__(self, name: str, /, **options: Option):
        if name not in REGISTRY:
            raise unknown("method", name, REGISTRY)
        known = REGISTRY[name].options
        for option, value in options.items():
            if option not in known:
                raise unknown(f"{name} option", option, known)
            _checked(name, option, value, known[option])
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "options", tuple(sorted(options.items())))

    @classmethod
    def parse(cls, text: str) -> "Method":
        """Reads `name` or `name:option=value,option=value`."""
        name, _, rest = text.strip().partition(":")
        options: dict[str, Option] = {}
        for part in filter(None, (p.strip() for p in rest.split(","))):
            option, equals, value = part.partition("=")
            if not equals:
                raise InputError(f"option {part!r} of method {name!r} has no value; write {name}:{part}=VALUE")
            if option.strip() in options:
                raise InputError(f"option {option.strip()!r} of method {name!r} is given twice; keep one")
            options[option.strip()] = _value(value.strip())
        return cls(name.strip(), **options)

    def __str__(self) -> str:
        rest = ",".join(f"{k}={_text(v)}" for k, v in self.options)
        return f"{self.name}:{rest}" if rest else self.name

    def to_json(self) -> dict[str, Option]:
        """The method as plain data: its name and the options that were given."""
        return {"name": self.name, **dict(self.options)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Method":
        """The inverse of `to_json`."""
        if not isinstance(data, dict) or not isinstance(data.get("name"), str):
            raise InputError(f"a method is {{'name': ..., options}}, not {data!r}")
        return cls(data["name"], **{k: v for k, v in data.items() if k != "name"})

    def build(self, role: str) -> Quantizer:
        """The quantizer for a weight [in, out] or an activation [..., in]."""
        if role not in CONTRACTION_AXIS:
            raise unknown("role", role, CONTRACTION_AXIS)
        return _built(self, role)


@functools.cache
def _built(method: Method, role: str) -> Quantizer:
    entry = REGISTRY[method.name]
    if role not in entry.roles:
        fitting = ", ".join(sorted(name for name, other in REGISTRY.items() if role in other.roles))
        raise InputError(f"method {method.name!r} cannot take the role {role}; methods that can: {fitting}")
    exact = {
        k: float(v)
        if get_origin(entry.options[k].annotation) is Annotated or entry.options[k].annotation is float
        else v
        for k, v in method.options
    }
    return entry.build(role, **exact)


def variants(name: str) -> list[Method]:
    """The method as it stands, then with each value of each option that has a closed set of them, one at a time.

    Surrogates are left out: they change no value, and any goes with any method.
    """
    found = [Method(name)]
    for option, parameter in REGISTRY[name].options.items():
        if option == "surrogate":
            continue
        values = (False, True) if parameter.annotation is bool else listed(parameter)
        found += [Method(name, **{option: value}) for value in values if value != parameter.default]
    return found


def quantizer(text: str | Method | dict[str, Any] | None = None, role: str = "weight") -> Quantizer:
    """The quantizer that `text` names: `quantizer("fbi:granularity=output")`; no text is full precision."""
    if isinstance(text, dict):
        return Method.from_json(text).build(role)
    return (text if isinstance(text, Method) else Method.parse(text or "none")).build(role)
