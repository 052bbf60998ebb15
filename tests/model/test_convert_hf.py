import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fbi.errors import InputError
from fbi.model import Model
from fbi.model.convert import adapt, load_safetensors, save_safetensors
from fbi.policy import Policy

KINDS = {
    "llama": {},
    "grouped and tied": {"kv_heads": 2, "tied": True},
    "wide heads": {"head_dim": 16, "rope_base": 5e4, "eps": 1e-6},
    "bitnet": {"norm": "sub", "activation": "relu2", "kv_heads": 1},
    "bitnet with silu": {"norm": "sub"},
    "llama with relu2": {"activation": "relu2"},
}
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_saved_and_loaded_again_every_bit_and_field_is_the_same(kind, tiny, drawn, equal, tmp_path):
    model = Model(tiny(**KINDS[kind]))
    params = drawn(model)
    folder = save_safetensors(params, model, tmp_path / "new" / "export")
    config, loaded = load_safetensors(folder)
    assert config == model.config
    equal(loaded, params)
    equal(load_safetensors(folder / "model.safetensors")[1], params)
    assert [(p.name, oct(p.stat().st_mode)[-3:]) for p in sorted(folder.iterdir())] == [
        ("config.json", "644"),
        ("model.safetensors", "644"),
    ]


def test_a_checkpoint_keeps_matrices_as_out_in_under_the_names_of_transformers(tiny, tmp_path, drawn):
    model = Model(tiny(kv_heads=2))
    params = drawn(model)
    stored = load_file(save_safetensors(params, model, tmp_path / "export") / "model.safetensors")
    assert len(stored) == 3 + 3 * 9
    np.testing.assert_array_equal(
        stored["model.layers.2.self_attn.k_proj.weight"], params["layers_0_3"]["attn"]["k"]["w"][2].T
    )
    np.testing.assert_array_equal(
        stored["model.layers.1.mlp.down_proj.weight"], params["layers_0_3"]["mlp"]["down"]["w"][1].T
    )
    np.testing.assert_array_equal(stored["lm_head.weight"], params["head"]["w"].T)
    np.testing.assert_array_equal(stored["model.embed_tokens.weight"], params["embed"])


def test_the_latent_weights_of_any_policy_are_written_and_what_quantizers_learned_is_not(tiny, tmp_path, drawn, equal):
    model = Model(tiny(), Policy.parse("layers.1.*: w=none | layers.*.attn.{q,k,v,o}: w=fbi | head: w=fbi"))
    params = drawn(model)
    config, loaded = load_safetensors(save_safetensors(params, model.config, tmp_path / "export"))
    equal(loaded, adapt(params, model, Model(config)))


FOLDED = [
    ("llama", "fbi"),
    ("grouped and tied",
     "layers.{0,-1}.*: w=none | layers.*.attn.{q,k,v,o}: w=bitnet-b158 | *.mlp.*: w=fbi | embed: w=absmax:bits=4"),
    ("bitnet", "layers.*.mlp.*: w=fbi:granularity=output | {embed,head}: w=absmax:bits=4"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "policy"), FOLDED)
def test_folded_weights_give_the_logits_of_the_quantized_model(kind, policy, tiny, tokens, tmp_path, drawn):
    model = Model(tiny(**KINDS[kind]), Policy.parse(policy))
    params = drawn(model)
    config, folded = load_safetensors(save_safetensors(params, model, tmp_path / "folded", fold=True))
    expected = np.asarray(model.apply(params, tokens))
    np.testing.assert_allclose(Model(config).apply(folded, tokens), expected, atol=1e-5 * np.abs(expected).max())
    _, latent = load_safetensors(save_safetensors(params, model, tmp_path / "latent"))
    assert np.abs(Model(config).apply(latent, tokens) - expected).max() > 0.05 * np.abs(expected).max()


def test_half_precision_and_shards_are_read_as_float32(tiny, tmp_path, drawn):
    model = Model(tiny(kv_heads=2))
    folder = save_safetensors(drawn(model), model, tmp_path / "export")
    stored = load_file(folder / "model.safetensors")
    types = [ml_dtypes.bfloat16, np.float16, np.float32]
    stored = {name: x.astype(types[i % 3]) for i, (name, x) in enumerate(stored.items())}
    (folder / "model.safetensors").unlink()
    names, where = sorted(stored), {}
    for shard in range(2):
        file = f"model-0000{shard + 1}-of-00002.safetensors"
        save_file({name: stored[name] for name in names[shard::2]}, folder / file)
        where |= dict.fromkeys(names[shard::2], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    _, loaded = load_safetensors(str(folder))
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype("float32")}
    expected = stored["model.layers.1.self_attn.q_proj.weight"].astype(np.float32).T
    np.testing.assert_array_equal(loaded["layers_0_3"]["attn"]["q"]["w"][1], expected)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"cannot read .*00002-of-00002.*missing"):
        load_safetensors(folder)


@pytest.mark.parametrize("shape", [(1, 1), (4, 2)])
def test_parameters_are_loaded_to_where_the_mesh_keeps_them(shape, tiny, tmp_path, drawn, equal):
    model = Model(tiny(kv_heads=2))
    params = drawn(model)
    folder = save_safetensors(params, model, tmp_path / "export")
    with jax.set_mesh(jax.make_mesh(shape, ("data", "model"), devices=jax.devices()[: shape[0] * shape[1]])):
        loaded = load_safetensors(folder)[1]
        jax.tree.map(lambda x, leaf: x.sharding.spec == leaf.sharding.spec or pytest.fail(str(x.sharding)),
                     loaded, model.abstract())  # fmt: skip
        again = save_safetensors(loaded, model, tmp_path / "again", fold=True)
    equal(load_safetensors(again)[1], params)


@pytest.fixture
def export(tiny, tmp_path, drawn):
    """A good checkpoint, and how to spoil it: `change(key=value)` in its config, `rewrite(tensors)` in its file."""
    model = Model(tiny(kv_heads=2))
    folder = save_safetensors(drawn(model), model, tmp_path / "export")

    def change(**fields):
        config = json.loads((folder / "config.json").read_text()) | fields
        config = {key: value for key, value in config.items() if value != "ABSENT"}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return change


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


CONFIGS = {
    "rope_theta of version 4": ({"rope_parameters": "ABSENT", "rope_theta": 7e4}, {"rope_base": 7e4}),
    "rope_parameters of version 5": (
        {"rope_theta": "ABSENT", "rope_parameters": {"rope_theta": 9e4, "rope_type": "default"}},
        {"rope_base": 9e4},
    ),
    "no rope, no head_dim": (
        {"rope_theta": "ABSENT", "rope_parameters": "ABSENT", "rope_scaling": None, "head_dim": None},
        {"rope_base": 1e4},
    ),
    "defaults of llama": (
        {"rms_norm_eps": "ABSENT", "max_position_embeddings": "ABSENT"},
        {"eps": 1e-6, "context": 2048},
    ),
    "a sliding window is the context": ({"model_type": "mistral", "sliding_window": 16}, {"context": 16}),
    "no sliding window": ({"model_type": "mistral", "sliding_window": None}, {"context": 64}),
    "the usual sliding window": (
        {"model_type": "mistral", "max_position_embeddings": "ABSENT"},
        {"context": 4096},
    ),
    "latent weights of bitnet": (
        {"quantization_config": {"quant_method": "bitnet", "quantization_mode": "online"}},
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_of_both_versions_of_transformers_are_understood(case, export, tiny):
    fields, expected = CONFIGS[case]
    assert load_safetensors(export(**fields))[0] == tiny(kv_heads=2, **expected)


def test_old_rotary_tables_and_a_repeated_tied_head_are_left_out(export):
    folder = export(tie_word_embeddings=True)
    tensors = tensors_of(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, folder / "model.safetensors")
    config, params = load_safetensors(folder)
    assert config.tied
    assert "head" not in params
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match="does not explain: lm_head"):
        load_safetensors(folder)


BAD_CONFIGS = {
    "unknown model_type in .* 'gpt2'; valid: bitnet, llama, mistral": {"model_type": "gpt2"},
    "unknown model_type in .* 'mistrall' .did you mean 'mistral'": {"model_type": "mistrall"},
    "lacks vocab_size, num_hidden_layers": {"vocab_size": "ABSENT", "num_hidden_layers": None},
    "attention_bias is true; linear layers with biases": {"attention_bias": True},
    "mlp_bias is true": {"mlp_bias": True},
    "rope scaling 'llama3' is not supported": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    "rope scaling 'linear' is not supported": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "rope scaling 'yarn' is not": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
    "rope_scaling='linear' is no JSON object": {"rope_scaling": "linear"},
    "partial_rotary_factor=0.5": {"partial_rotary_factor": 0.5},
    "unknown hidden_act in .* 'gelu' .*; valid: relu2, silu, swish": {"hidden_act": "gelu"},
    "hidden_size='32' is not a whole number": {"hidden_size": "32"},
    "num_hidden_layers=True is not a whole": {"num_hidden_layers": True},
    "vocab_size=64.5 is not a whole": {"vocab_size": 64.5},
    "rope_theta='x' is not a number": {"rope_parameters": {"rope_theta": "x"}},
    "kv_heads=3 does not divide heads=4": {"num_key_value_heads": 3},
    "layers=0 must be at least 1": {"num_hidden_layers": 0},
    "quantization_config 'awq' means packed": {"quantization_config": {"quant_method": "awq"}},
    "quantization_config 'bitnet' means packed": {"quantization_config": {"quant_method": "bitnet"}},
    r"lacks 9 tensors .*: model.layers.3.self_attn.k_proj.weight, .* and 5 more": {"num_hidden_layers": 4},
    "has 9 tensors that its config does not explain: model.layers.2.*and 5 more": {"num_hidden_layers": 2},
    r"lacks 6 tensors .*attn_sub_norm": {"model_type": "bitnet"},
    r"embed_tokens.weight is \[64, 32\], not \[65, 32\]": {"vocab_size": 65},
}  # fmt: skip


@pytest.mark.parametrize("says", BAD_CONFIGS)
def test_a_config_that_cannot_be_expressed_is_a_one_line_error(says, export):
    folder = export(**BAD_CONFIGS[says])
    with pytest.raises(InputError, match=says) as caught:
        load_safetensors(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value) or "model." in says or "must be" in says or "divide" in says


Q, UP = "model.layers.0.self_attn.q_proj.bias", "model.layers.1.mlp.up_proj.weight"
BAD_TENSORS = {
    f"has biases, which this model does not: {Q}": {Q: np.zeros(32, np.float32)},
    "has 1 tensors that its config does not explain: odd.weight": {"odd.weight": np.zeros(8, np.float32)},
    "lacks 1 tensors that its config asks for: model.norm.weight": {"model.norm.weight": None},
    rf"{UP} is \[32, 48\], not \[48, 32\]": {UP: np.zeros((32, 48), np.float32)},
    f"other than F32, F16, BF16: {UP} is U8; packed": {UP: np.zeros((12, 32), np.uint8)},
}


@pytest.mark.parametrize("says", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_named(says, export):
    folder = export()
    tensors = {name: x for name, x in (tensors_of(folder) | BAD_TENSORS[says]).items() if x is not None}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=says) as caught:
        load_safetensors(folder)
    assert "\n" not in str(caught.value)


def test_missing_cut_and_pickled_files_are_one_line_errors(export, tmp_path):
    folder = export()
    whole = (folder / "model.safetensors").read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"cannot read .*model.safetensors: .*cut short"):
            load_safetensors(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds neither model.safetensors nor model.safetensors.index.json"):
        load_safetensors(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02c__builtin__\nexit\n.")
    for path in (folder, folder / "pytorch_model.bin"):
        with pytest.raises(InputError, match=r"pytorch_model.bin is a pickle.*convert it to safetensors"):
            load_safetensors(path)
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(InputError, match="has no weight_map"):
        load_safetensors(folder)
    (folder / "config.json").write_text("[]")
    (folder / "model.safetensors").write_bytes(whole)
    with pytest.raises(InputError, match=r"config.json holds no JSON object"):
        load_safetensors(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"cannot read .*config.json: No such file"):
        load_safetensors(folder)
    with pytest.raises(InputError, match="does not exist; give a folder"):
        load_safetensors(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(InputError, match=r"notes.txt is not read"):
        load_safetensors(tmp_path / "notes.txt")


def test_what_transformers_cannot_hold_is_refused_and_nothing_is_left(tiny, tmp_path, drawn):
    model = Model(tiny())
    params = drawn(model)
    cases = [
        (tiny(norm="inner"), {}, "norm='inner'"),
        (tiny(norm="sub", head_dim=4), {}, r"heads\*head_dim=16 has no model.*equal dim=32"),
        (tiny(), {"fold": True}, "fold=True needs the Model"),
        (dataclasses.replace(tiny(), layers=2), {}, "params has 9 tensors that its config does not explain"),
        (tiny(tied=True), {}, "does not explain: lm_head.weight"),
    ]
    for config, options, says in cases:
        with pytest.raises(InputError, match=says):
            save_safetensors(params, config, tmp_path / "export", **options)
    inner = Model(tiny(norm="inner"))
    with pytest.raises(InputError, match="norm='inner'"):
        save_safetensors(drawn(inner), inner, tmp_path / "export")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "export").mkdir()
    save_safetensors(params, model, tmp_path / "export")
    with pytest.raises(InputError, match="exists already; choose a new folder"):
        save_safetensors(params, model, tmp_path / "export")
