"""From a config to windows on disk: corpus, tokenizer, windows, each made once."""

from fbi.data import corpus, tokenizer
from fbi.data.config import DataConfig
from fbi.data.pack import Progress
from fbi.data.windows import Windows, write_folder
from fbi.files import cache_root, content_hash, whole_directory

_VERSION = 1  # of the packing; a change makes all windows anew


def prepare(config: DataConfig, progress: Progress | None = None) -> Windows:
    """The windows of a config, below `cache_root()/windows`, made where they are not there yet.

    `progress(done, total, unit)` is called while documents are tokenised. What was interrupted is made again from its
    last whole part. `InputError` for bad input, as one line.
    """
    source = corpus.documents(config)
    tokens = tokenizer.for_corpus(config.tokenizer, source)
    hashes = {"corpus": source.hash, "tokenizer": tokens.fingerprint}
    folder = cache_root() / "windows" / content_hash([_VERSION, hashes, config.window])
    if not folder.is_dir():
        with whole_directory(folder) as temporary:
            empty_test = config.test == 0
            write_folder(temporary, source.splits, tokens, config.window, hashes, empty_test, progress)
    return Windows(folder)
