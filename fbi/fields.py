"""Fields that a configuration gained after hashes of it were published."""

import dataclasses
from typing import Any, TypeVar, cast

Value = TypeVar("Value")
_LATER = "later"


def later(default: Value) -> Value:
    """A dataclass field with this default that `hashed` leaves out at its default: older hashes stay what they are."""
    return cast(Value, dataclasses.field(default=default, metadata={_LATER: True}))


def hashed(config: Any) -> dict[str, Any]:
    """A configuration as plain data, nested ones too, without the `later` fields that are at their defaults."""
    content: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not (field.metadata.get(_LATER) and value == field.default):
            content[field.name] = hashed(value) if dataclasses.is_dataclass(value) else value
    return content
