"""Hugging Face folders (config.json and safetensors) of the Llama type, read and written. No pickle is ever opened."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fbi.errors import InputError, unknown
from fbi.files import read_json, whole_directory, write_json
from fbi.model.config import ModelConfig
from fbi.model.convert_layout import HUGGING_FACE, Stored, Weight, assemble, check, disassemble, some
from fbi.model.functional import Model, Params
from fbi.policy import Methods
from fbi.quant import Method

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES = ("F32", "F16", "BF16")
_ACTIVATIONS: dict[Any, Literal["silu", "relu2"]] = {"silu": "silu", "swish": "silu", "relu2": "relu2"}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# What transformers takes for a key that config.json leaves out; 0 key-value heads: as many as query heads.
_LLAMA = {
    "num_key_value_heads": 0,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    "bitnet": _LLAMA | {"num_key_value_heads": 5, "hidden_act": "relu2", "rms_norm_eps": 1e-5, "rope_theta": 5e5},
}


def load_safetensors(path: str | Path) -> tuple[ModelConfig, Params]:
    """A Llama, Mistral or BitNet checkpoint as our config and float32 parameters under the policy `fp`.

    `path` is a folder with config.json and model.safetensors (or its shards and their index), or one .safetensors
    file beside its config.json. A Mistral model with a sliding window gets that window as its context, within which
    the two are equal. `InputError` for whatever our model cannot express.
    """
    folder, files = _files(Path(path))
    config = read_config(folder / "config.json")
    with _opened(files) as stored:
        if config.tied:  # some writers repeat the embedding as the head
            head, table = (stored.get(HUGGING_FACE[name]) for name in ("head.w", "embed"))
            if head and table and np.array_equal(head.read(), table.read()):
                del stored[HUGGING_FACE["head.w"]]
        return config, assemble(config, stored, HUGGING_FACE, str(path))


def _files(path: Path) -> tuple[Path, list[Path]]:
    """The folder of the config, and the files of the tensors."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise _not_safetensors(path)
        return path.parent, [path]
    if not path.is_dir():
        raise InputError(f"{path} does not exist; give a folder with config.json and {_SINGLE}")
    if (path / _SINGLE).is_file():
        return path, [path / _SINGLE]
    if (path / _INDEX).is_file():
        shards = _read_object(path / _INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(v, str) for v in shards.values()):
            raise InputError(f"{path / _INDEX} has no weight_map of tensor names to files")
        return path, [path / name for name in sorted(set(shards.values()))]
    pickles = sorted(file for file in path.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise _not_safetensors(pickles[0])
    raise InputError(f"{path} holds neither {_SINGLE} nor {_INDEX}")


def _not_safetensors(path: Path) -> InputError:
    pickled = " is a pickle, which can run any code when opened, and" if path.suffix in _PICKLES else ""
    return InputError(f"{path}{pickled} is not read; convert it to safetensors (save_pretrained of transformers does)")


@contextlib.contextmanager
def _opened(files: list[Path]) -> Iterator[dict[str, Stored]]:
    """Every tensor of the files by name; they are read while the files are open."""
    with contextlib.ExitStack() as stack:
        stored: dict[str, Stored] = {}
        for path in files:
            try:
                file = cast(Any, stack.enter_context(safe_open(path, "numpy")))
            except (SafetensorError, OSError) as error:
                raise InputError(f"cannot read {path}: {error}; it is missing, cut short or no safetensors") from error
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            odd = [f"{name} is {s.get_dtype()}" for name, s in slices.items() if s.get_dtype() not in _DTYPES]
            if odd:
                raise InputError(f"{path} has tensors other than {', '.join(_DTYPES)}: {some(odd)}; packed weights "
                                 "are not read, load the checkpoint that they were made from")  # fmt: skip
            for name, part in slices.items():
                if not name.endswith("rotary_emb.inv_freq"):  # old writers kept the rotary frequencies
                    stored[name] = Stored(tuple(part.get_shape()), functools.partial(file.get_tensor, name))
        yield stored


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object")
    return value


def read_config(path: Path) -> ModelConfig:
    """Our config for a config.json of transformers, version 4 or 5. `InputError` where we have no such model."""
    raw = _read_object(path)
    kind = raw.get("model_type")
    if kind not in _DEFAULTS:
        raise unknown(f"model_type in {path}", kind, _DEFAULTS)
    if absent := [key for key in _REQUIRED if raw.get(key) is None]:
        raise InputError(f"{path} lacks {', '.join(absent)}")
    for key in ("rope_scaling", "rope_parameters", "quantization_config"):
        if raw.get(key) and not isinstance(raw[key], dict):
            raise InputError(f"{path}: {key}={raw[key]!r} is no JSON object")
    raw = _DEFAULTS[kind] | {key: value for key, value in raw.items() if value is not None or key == "sliding_window"}
    _refuse(raw, path)

    def number(key: str, kind: Callable = int) -> Any:
        if isinstance(raw[key], bool) or not isinstance(raw[key], int | float) or kind(raw[key]) != raw[key]:
            raise InputError(f"{path}: {key}={raw[key]!r} is not {'a whole' if kind is int else 'a'} number")
        return kind(raw[key])

    if raw["hidden_act"] not in _ACTIVATIONS:
        raise unknown(f"hidden_act in {path}", raw["hidden_act"], _ACTIVATIONS)
    heads, context = number("num_attention_heads"), number("max_position_embeddings")
    raw = {"head_dim": number("hidden_size") // max(heads, 1)} | raw
    raw["rope_theta"] = _rope(raw).get("rope_theta", raw["rope_theta"])
    return ModelConfig(
        vocab=number("vocab_size"),
        dim=number("hidden_size"),
        layers=number("num_hidden_layers"),
        heads=heads,
        kv_heads=number("num_key_value_heads") or heads,
        head_dim=number("head_dim"),
        ff=number("intermediate_size"),
        context=min(context, number("sliding_window")) if raw.get("sliding_window") else context,
        activation=_ACTIVATIONS[raw["hidden_act"]],
        norm="sub" if kind == "bitnet" else "pre",
        tied=bool(raw.get("tie_word_embeddings", False)),
        rope_base=number("rope_theta", float),
        eps=number("rms_norm_eps", float),
    )


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    return (raw.get("rope_scaling") or {}) | (raw.get("rope_parameters") or {})


def _refuse(raw: dict[str, Any], path: Path) -> None:
    """What would change the numbers and our model does not have."""
    if biased := [key for key in ("attention_bias", "mlp_bias") if raw.get(key)]:
        raise InputError(f"{path}: {', '.join(biased)} is true; linear layers with biases are not supported")
    for rope in (raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}):
        if (scaling := rope.get("rope_type") or rope.get("type") or "default") != "default":
            raise InputError(f"{path}: rope scaling {scaling!r} is not supported; only plain rotary positions, default")
    if (part := _rope(raw).get("partial_rotary_factor", raw.get("partial_rotary_factor", 1))) != 1:
        raise InputError(f"{path}: partial_rotary_factor={part} is not supported; only 1")
    quantized = raw.get("quantization_config") or {}
    latent = quantized.get("quant_method") == "bitnet" and quantized.get("quantization_mode") == "online"
    if quantized and (not latent or quantized.get("use_rms_norm")):
        raise InputError(
            f"{path}: quantization_config {quantized.get('quant_method')!r} means packed weights or layers that we do "
            "not have; only bitnet's latent weights (quantization_mode online, no use_rms_norm) are read"
        )


def save_safetensors(params: Params, model: Model | ModelConfig, folder: str | Path, *, fold: bool = False) -> Path:
    """Writes the weights as a new folder that transformers loads, in float32, and returns it; whole or not at all.

    Latent weights by default; the policy and what its quantizers learned are not kept. With `fold`, the quantized
    weights of `model` (a Model, for its policy): stock transformers then gives the same logits where the policy leaves
    activations alone. Norm `pre` becomes model_type llama, `sub` bitnet.
    """
    folder, config = Path(folder), model.config if isinstance(model, Model) else model
    if fold and not isinstance(model, Model):
        raise InputError("fold=True needs the Model, whose policy says how; a ModelConfig has none")
    described = _described(config)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    if folder.exists():
        raise InputError(f"{folder} exists already; choose a new folder")
    tensors: dict[str, np.ndarray] = {}
    for weight in disassemble(params, HUGGING_FACE):
        value = _quantized(weight, model) if fold and isinstance(model, Model) else weight
        tensors[weight.name] = value.stored.astype(np.float32)
    check(config, {name: tensor.shape for name, tensor in tensors.items()}, HUGGING_FACE, "params")
    with whole_directory(folder) as temporary:
        write_json(temporary / "config.json", described)
        try:
            save_file(tensors, temporary / _SINGLE, metadata={"format": "pt"})  # transformers reads no file without it
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot write {folder / _SINGLE}: {error}") from error
        (temporary / _SINGLE).chmod(0o644)
    return folder


def _quantized(weight: Weight, model: Model) -> Weight:
    method = model.bound.get(weight.site, Methods()).weight
    return weight._replace(value=np.asarray(_apply(method)(jnp.asarray(weight.value), weight.learned)))


@functools.cache
def _apply(method: Method) -> Callable[..., jax.Array]:
    return jax.jit(method.build("weight").apply)


def _described(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, for transformers 4 and 5."""
    c = config
    if c.expert or not c.gated:
        raise InputError(
            f"a model with expert={c.expert}, gated={str(c.gated).lower()} has none in transformers, whose Llama has a "
            "dense gated MLP; keep its run directory"
        )
    if c.norm == "inner":
        raise InputError("norm='inner' (a norm inside each linear layer) has no model in transformers; use pre or sub")
    if c.norm == "sub" and c.heads * c.head_dim != c.dim:
        raise InputError(
            f"norm='sub' with heads*head_dim={c.heads * c.head_dim} has no model in transformers, whose BitNet takes "
            f"it to equal dim={c.dim}"
        )
    kind, name = ("llama", "LlamaForCausalLM") if c.norm == "pre" else ("bitnet", "BitNetForCausalLM")
    return {
        "architectures": [name],
        "model_type": kind,
        "vocab_size": c.vocab,
        "hidden_size": c.dim,
        "intermediate_size": c.ff,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": c.activation,
        "max_position_embeddings": c.context,
        "rms_norm_eps": c.eps,
        "rope_theta": c.rope_base,
        "rope_parameters": {"rope_theta": c.rope_base, "rope_type": "default"},
        "tie_word_embeddings": c.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": c.init_std,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": "float32",
    }
