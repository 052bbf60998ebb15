"""Presets have the published parameter counts."""

import pytest

from fbi.errors import InputError
from fbi.model import Model, ModelConfig, build
from fbi.model.config import PRESETS, check, count_parameters, preset
from fbi.policy import Policy

QUEST = {"30m": 30_482_560, "50m": 49_556_736, "100m": 102_777_856, "200m": 203_188_480, "430m": 443_068_288,
         "800m": 822_151_168}  # fmt: skip


@pytest.mark.parametrize("size", QUEST)
def test_quest_presets_have_the_published_non_embedding_counts(size):
    assert count_parameters(preset(f"quest-{size}")).non_embedding == QUEST[size]


@pytest.mark.parametrize(
    ("name", "linear", "scales"),
    [
        ("fbi-130m", 84_934_656, 159_744),
        ("fbi-1.3b", 1_233_125_376, 860_160),
        ("fbi-7b", 6_476_005_376, 2_277_376),
    ],
)
def test_fbi_presets_have_the_published_counts_of_weights_and_scales(name, linear, scales):
    counts = count_parameters(preset(name))
    assert counts.linear == linear
    assert build(name, "fbi").parameter_count() - build(name).parameter_count() == scales
    assert counts.embedding == counts.head == 32_000 * preset(name).dim


def test_fbi_130m_takes_537_062_400_bytes_in_float32():
    assert 4 * build("fbi-130m", "fbi").parameter_count() == 537_062_400


def test_smollm2_and_2b4t_count_as_published():
    assert count_parameters(preset("smollm2-135m")).total == 134_515_008
    assert round(count_parameters(preset("bitnet-2b4t")).total / 1e9, 1) == 2.4


@pytest.mark.parametrize("name", PRESETS)
def test_counts_from_shapes_equal_the_arrays_a_model_would_make(name):
    assert Model(preset(name)).parameter_count() == count_parameters(preset(name)).total


@pytest.mark.parametrize("norm", ["pre", "inner", "sub"])
def test_counts_follow_the_placement_of_norms(norm):
    config = ModelConfig(norm=norm)
    assert Model(config, Policy()).parameter_count() == count_parameters(config).total


def test_small_presets_have_widths_of_128():
    for name in ("nano", "micro"):
        assert preset(name).dim % 128 == preset(name).ff % 128 == 0


def test_a_shape_that_cannot_be_built_says_why():
    with pytest.raises(InputError, match=r"kv_heads=3 does not divide heads=4; use one of \[1, 2, 4\]"):
        check(ModelConfig(kv_heads=3))
    with pytest.raises(InputError, match="head_dim=7 is odd"):
        check(ModelConfig(head_dim=7))
