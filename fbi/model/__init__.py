"""Models: a Llama-type decoder whose linear layers are given their quantizers by a policy.

Calling the module makes one: `fbi.model("nano", policy="fbi", layers=2)`.
"""

import dataclasses
from typing import TYPE_CHECKING

from fbi.lazy import lazy_names, make_callable
from fbi.model.config import ModelConfig as ModelConfig
from fbi.model.config import preset as preset

if TYPE_CHECKING:
    from fbi.model.functional import Model as Model
    from fbi.model.functional import Params as Params
    from fbi.policy import Policy


def build(model: str | ModelConfig, policy: "str | Policy" = "fp", **changes: object) -> "Model":
    """The model of that preset (or config) under that policy; `changes` replace fields of the config."""
    from fbi.model.functional import Model
    from fbi.policy import Policy

    config = preset(model) if isinstance(model, str) else model
    fields: dict = dict(changes)
    rules = Policy.parse(policy) if isinstance(policy, str) else policy
    return Model(dataclasses.replace(config, **fields), rules)


__getattr__ = lazy_names("fbi.model", {"Model": "fbi.model.functional", "Params": "fbi.model.functional"})
make_callable(__name__, build)
