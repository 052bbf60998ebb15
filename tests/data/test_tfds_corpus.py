import numpy as np
import pytest

from fbi.data import DataConfig, prepare
from fbi.data.corpus import documents
from fbi.errors import InputError


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A TFDS folder with the set `tiny_texts`: train and test, no validation."""
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():

        class TinyTexts(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = {
                    "text": tfds.features.Text(),
                    "title": tfds.features.Text(),
                    "label": tfds.features.Scalar(np.int32),
                }
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):  # noqa: ARG002
                return {"train": self._generate_examples(0, 60), "test": self._generate_examples(60, 70)}

            def _generate_examples(self, start, stop):
                for key in range(start, stop):
                    yield key, {"text": f"text {key} " * 20, "title": b"\xff", "label": key}

    folder = tmp_path_factory.mktemp("tfds")
    TinyTexts(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture(autouse=True)
def tfds_home(tfds_folder, monkeypatch):
    from tensorflow_datasets.core import constants

    monkeypatch.setattr(constants, "DATA_DIR", str(tfds_folder))


def test_a_prepared_set_is_read_and_lacking_splits_come_from_train():
    config = DataConfig("tfds:tiny_texts", validation=0.2, test=0.4, tokenizer="bpe:280", window=16)
    found = documents(config).splits
    numbers = {split: {int(text.split()[1]) for text in texts} for split, texts in found.items()}
    assert numbers["test"] == set(range(60, 70))
    assert numbers["train"] | numbers["validation"] == set(range(60))
    assert not numbers["train"] & numbers["validation"]
    assert 3 < len(numbers["validation"]) < 25
    assert prepare(config).meta["splits"]["test"]["documents"] == 10
    assert documents(DataConfig("tfds:tiny_texts:1.0.0", validation=0.2, test=0.4)).hash == documents(config).hash


def test_unknown_names_and_features_say_what_is_valid():
    with pytest.raises(InputError) as caught:
        documents(DataConfig("tfds:tiny_textz"))
    assert "unknown TFDS data set 'tiny_textz' (did you mean tiny_texts" in str(caught.value)
    assert "prepared in" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(
        InputError, match=r"unknown text feature of tfds:tiny_texts .data.field. 'label'; valid: text, title"
    ):
        documents(DataConfig("tfds:tiny_texts", field="label"))
    with pytest.raises(InputError, match=r"TFDS cannot open 'glue/none'.*BuilderConfig none not found") as caught:
        documents(DataConfig("tfds:glue/none"))
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf8_says_which_document():
    with pytest.raises(InputError, match="document 0: feature 'title' is not UTF-8 text: invalid start byte at byte 0"):
        list(documents(DataConfig("tfds:tiny_texts", field="title")).splits["train"])
