"""Any TensorFlow Datasets corpus with a text feature, read without TensorFlow."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fbi.data import file_hashes, splits
from fbi.data.config import DataConfig
from fbi.data.corpus import Corpus, Documents, first_line, sorted_in_memory
from fbi.errors import InputError, unknown
from fbi.files import content_hash

_VERSION = 1
_NAMES = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}


def open_tfds(name: str, config: DataConfig) -> Corpus:
    """The corpus `NAME[/CONFIG][:VERSION]`, below `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.

    TFDS prepares it there first where it is not. Held-out splits that it lacks are taken from its train split by the
    hash of each text. `InputError` for an unknown name or feature, and for files that need TensorFlow.
    """
    builder = _builder(name)
    _check_feature(name, builder, config.field)
    if "train" not in builder.info.splits:
        raise InputError(f"tfds:{name} has no train split; its splits: {', '.join(builder.info.splits) or 'none'}")
    folder = Path(builder.data_path)
    hashes = file_hashes.of_files(folder, sorted(file for file in folder.iterdir() if file.is_file()))
    key = content_hash([_VERSION, hashes, config.field, config.validation, config.test])
    return Corpus(builder.info.full_name, key, lambda: _splits(name, builder, config))


def _builder(name: str) -> Any:
    """A builder whose data are on disk as ArrayRecord."""
    import tensorflow_datasets as tfds
    import tensorflow_datasets.text  # registers the text data sets

    try:
        builder = tfds.builder(name)
    except tfds.core.DatasetNotFoundError as error:
        raise _unknown_name(name, tfds.list_builders(with_community_datasets=False)) from error
    except Exception as error:  # a bad config or version: TFDS raises several kinds
        raise InputError(f"TFDS cannot open {name!r}: {first_line(error)}") from error
    if not Path(builder.data_path).is_dir():
        settings = tfds.download.DownloadConfig(try_download_gcs=False)
        try:
            with sorted_in_memory():
                builder.download_and_prepare(download_config=settings, file_format="array_record")
        except Exception as error:  # whatever the data set's own code and downloads raise
            raise InputError(f"TFDS cannot prepare {name!r}: {first_line(error)}") from error
    return builder


def _unknown_name(name: str, own: list[str]) -> InputError:
    """Names what is near and what lies in TFDS's default folder; TFDS's own sets are some 300."""
    from tensorflow_datasets.core import constants

    root = Path(constants.DATA_DIR).expanduser()
    here = sorted(folder.name for folder in root.iterdir() if folder.is_dir()) if root.is_dir() else []
    near = difflib.get_close_matches(name, {*own, *here}, n=3)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    return InputError(
        f"unknown TFDS data set {name!r}{hint}; prepared in {root}: {', '.join(here) or 'none'}; "
        "tfds.list_builders(with_community_datasets=False) names those that TFDS can prepare"
    )


def _check_feature(name: str, builder: Any, field: str) -> None:
    import tensorflow_datasets as tfds

    features = builder.info.features
    rows = features.items() if isinstance(features, tfds.features.FeaturesDict) else ()
    texts = [key for key, feature in rows if isinstance(feature, tfds.features.Text)]
    if field not in texts:
        raise unknown(f"text feature of tfds:{name} (data.field)", field, texts)


def _splits(name: str, builder: Any, config: DataConfig) -> Mapping[str, Documents]:
    def source(split: str) -> Any:
        try:
            return builder.as_data_source(split=split)
        except (NotImplementedError, ValueError) as error:
            raise InputError(
                f"tfds:{name} lies at {builder.data_path} in a format that needs TensorFlow to be read; "
                "prepare it anew with file_format='array_record'"
            ) from error

    own = {
        split: Documents(source(found), config.field)
        for split, names in _NAMES.items()
        if (found := next((n for n in names if n in builder.info.splits), None))
    }
    if len(own) == len(_NAMES):
        return own
    # a split that the data set has takes nothing from train
    shares = [0.0 if split in own else getattr(config, split) for split in ("validation", "test")]
    assigned = [splits.by_text(text, *shares) for text in own["train"]]
    held = {
        split: Documents(source("train"), config.field, [row for row, to in enumerate(assigned) if to == index])
        for index, split in enumerate(splits.SPLITS)
    }
    return held | {split: own[split] for split in own if split != "train"}
