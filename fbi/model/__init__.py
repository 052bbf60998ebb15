"""Models: a Llama-type decoder whose linear layers are given their quantizers by a policy. `fbi.model(...)` makes one."""

import dataclasses
import sys

from fbi.callable_module import make_callable
from fbi.model.config import ModelConfig as ModelConfig
from fbi.model.config import preset as preset
from fbi.model.functional import Model as Model
from fbi.model.functional import Params as Params
from fbi.policy import Policy


def build(model: str | ModelConfig, policy: str | Policy = "fp", **changes: object) -> Model:
    """The model of that preset (or config) under that policy; `changes` replace fields: `fbi.model("nano", layers=2)`."""
    config = preset(model) if isinstance(model, str) else model
    fields: dict = dict(changes)
    return Model(dataclasses.replace(config, **fields), Policy.parse(policy) if isinstance(policy, str) else policy)


make_callable(sys.modules[__name__], build)
