"""Targets by name, what their links carry, which compiler is taken."""

import pytest

from fbi.errors import InputError
from fbi.preflight.targets import COMPILERS, compiler_for, installed, larger, parse


@pytest.mark.parametrize(
    ("text", "count", "shape"),
    [
        ("v5e-64", 64, (8, 8)),
        ("v6e-256", 256, (16, 16)),
        ("v5p-128", 64, (4, 4, 4)),  # its name counts cores, of which a chip has two
        ("v4-8", 4, (2, 2, 1)),
        ("h100x8", 8, (1, 8)),
        ("h100x32", 32, (4, 8)),
        ("h100x3", 3, (1, 3)),
        ("cpu:8", 8, (8,)),
    ],
)
def test_names(text, count, shape):
    target = parse(text)
    assert (target.count, target.shape) == (count, shape)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("v9z-64", ["unknown target 'v9z-64'", "v5e-64", "h100x8", "cpu:8"]),
        ("a100x8", ["unknown target chip 'a100'", "h100"]),
        ("v7-8", ["unknown target chip 'v7'", "v5e"]),
        ("v5e-63", ["no slice v5e-63", "v5e-64", "v5e-256"]),
        ("h100x12", ["beyond one host", "multiple of its 8 GPUs"]),
        ("h100x0", ["give from 1"]),
        ("cpu:0", ["give from 1", "cpu:8"]),
        ("cpu:9999", ["give from 1 to 1024"]),
        ("", ["unknown target ''"]),
    ],
)
def test_names_that_are_none(text, says):
    with pytest.raises(InputError) as error:
        parse(text)
    assert all(words in str(error.value) for words in says), error.value


def test_links():
    # v5e, 16 x 16: both axes close to rings of 90 GB/s each; 8 x 8: neither does, so that each has half.
    assert parse("v5e-256").link(256) == ("ICI", 2 * 9e10)
    assert parse("v5e-256").link(16) == ("ICI", 9e10)
    assert parse("v5e-64").link(64) == ("ICI", 2 * 4.5e10)
    assert parse("v5p-128").link(64) == ("ICI", 3 * 1.8e11)
    assert parse("h100x32").link(8) == ("NVLink", 4.5e11)
    assert parse("h100x32").link(4, 8) == ("network", 5e10)  # one GPU of each host
    assert parse("h100x32").link(32) == ("network", 5e10)


def test_larger_ones():
    assert [target.name for target in larger(parse("v5e-64"))] == ["v5e-128", "v5e-256"]
    assert [target.name for target in larger(parse("h100x16"))] == ["h100x32", "h100x64", "h100x128", "h100x256"]
    assert larger(parse("cpu:8")) == []


@pytest.mark.parametrize(("name", "platform", "extra"), [("v5e-8", "tpu", "libtpu"), ("h100x8", "cuda", "CUDA plugin")])
def test_a_compiler_that_is_demanded(name, platform, extra):
    target = parse(name)
    assert compiler_for(target, "cpu") == "cpu"
    if installed(platform):
        assert compiler_for(target) == compiler_for(target, platform) == platform
    else:
        assert compiler_for(target) == "cpu"
        with pytest.raises(InputError, match=rf"needs .*{extra}.*not installed; pip install 'fbi\[{platform}\]'"):
            compiler_for(target, platform)


def test_a_compiler_that_does_not_fit():
    with pytest.raises(InputError, match="compiler tpu does not compile for h100x8; use cuda, cpu or auto"):
        compiler_for(parse("h100x8"), "tpu")
    with pytest.raises(InputError, match=r"unknown compiler 'gcc'.*auto, cpu, cuda, tpu"):
        compiler_for(parse("h100x8"), "gcc")
    assert set(COMPILERS) == {"auto", "tpu", "cuda", "cpu"}
