import dataclasses
import json
import subprocess
import sys

import pytest

from fbi.data.config import DataConfig, check
from fbi.errors import InputError


def test_the_default_config_is_valid_and_round_trips_through_json():
    check(DataConfig())
    assert DataConfig(**json.loads(json.dumps(dataclasses.asdict(DataConfig())))) == DataConfig()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"corpus": "sotus"}, "unknown corpus 'sotus' .did you mean 'sotu'"),
        ({"corpus": "sotu:1"}, "unknown corpus"),
        ({"corpus": "text:"}, "names nothing after the colon"),
        ({"field": ""}, "field is empty"),
        ({"tokenizer": "bpe:256"}, "at least 257"),
        ({"tokenizer": "bpe"}, "at least 257"),
        ({"tokenizer": "bpe:many"}, "at least 257"),
        ({"tokenizer": ""}, "tokenizer is empty"),
        ({"window": 1}, "window is 1; it must be an integer of at least 2"),
        ({"batch": 0}, "batch is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"validation": 0.0}, "validation is 0"),
        ({"validation": 1.5}, "validation is 1.5"),
        ({"test": -0.1}, "test is -0.1"),
        ({"validation": 0.5, "test": 0.5}, "leave nothing to train on"),
    ],
)
def test_a_bad_value_is_one_line_that_names_it(change, says):
    with pytest.raises(InputError, match=says) as caught:
        check(dataclasses.replace(DataConfig(), **change))
    assert "\n" not in str(caught.value)


def test_neither_importing_nor_preparing_nor_reading_loads_jax_or_tensorflow(text_folder, environment):
    program = f"""
import sys
from fbi.data.config import DataConfig
assert not {{"numpy", "tensorflow_datasets", "tokenizers"}} & set(sys.modules)
import fbi.data
windows = fbi.data.prepare(DataConfig("text:{text_folder}", tokenizer="bpe:300", window=16, validation=0.2))
windows.read("train", 0), windows.stream("validation"), windows.token_bytes
assert not {{"jax", "tensorflow", "torch"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_the_package_names_what_it_exports():
    import fbi.data

    assert all(callable(getattr(fbi.data, name)) for name in fbi.data.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = fbi.data.nothing
