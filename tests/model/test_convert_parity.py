"""Logits equal to those of transformers, which the project itself does not need: `pip install -e '.[dev,parity]'`."""

import numpy as np
import pytest

from fbi.model import Model
from fbi.model.convert import load_safetensors, save_safetensors
from fbi.policy import Policy

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, num_key_value_heads=2),
    "tied llama with wide heads": lambda: transformers.LlamaConfig(
        **SIZES, head_dim=16, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_parameters={"rope_theta": 5e4}
    ),
    "mistral": lambda: transformers.MistralConfig(**SIZES, num_key_value_heads=1, sliding_window=32),
    "bitnet": lambda: transformers.BitNetConfig(**SIZES, num_key_value_heads=2),
    "tied bitnet": lambda: transformers.BitNetConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
}


def theirs(model, tokens):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(np.array(tokens)).long()).logits.numpy()


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, "float32") for kind in CONFIGS), ("llama", "bfloat16")])
def test_a_checkpoint_of_transformers_gives_the_same_logits_here(kind, dtype, tokens, tmp_path):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]())
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that a wrong detail shows; no norm is one
            parameter.copy_(0.3 * torch.randn_like(parameter) + (parameter.ndim == 1))
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "theirs")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    config, params = load_safetensors(tmp_path / "theirs")
    assert config.norm == ("sub" if "bitnet" in kind else "pre")
    assert config.activation == ("relu2" if "bitnet" in kind else "silu")
    expected = theirs(model, tokens)
    np.testing.assert_allclose(Model(config).apply(params, tokens), expected, atol=1e-4, rtol=1e-4)


EXPORTS = {
    "llama": {"kv_heads": 2, "rope_base": 3e4, "eps": 1e-6},
    "tied llama with wide heads": {"tied": True, "head_dim": 16},
    "llama with relu2": {"activation": "relu2"},
    "bitnet": {"norm": "sub", "activation": "relu2", "kv_heads": 2},
    "tied bitnet with silu": {"norm": "sub", "tied": True},
}


@pytest.mark.parametrize("policy", ["fp", "fbi", "layers.0.*: w=none | layers.*.attn.*: w=bitnet-b158 | head: w=fbi"])
@pytest.mark.parametrize("kind", EXPORTS)
def test_an_exported_folder_gives_the_same_logits_in_transformers(kind, policy, tiny, drawn, tokens, tmp_path):
    policy = policy.replace("head: w=fbi", "embed: w=absmax:bits=8") if "tied" in kind else policy
    model = Model(tiny(**EXPORTS[kind]), Policy.parse(policy))
    params = drawn(model)
    folder = save_safetensors(params, model, tmp_path / "ours", fold=True)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = np.asarray(model.apply(params, tokens))
    np.testing.assert_allclose(theirs(loaded, tokens), expected, atol=1e-4, rtol=1e-4)
