"""Strict JAX for every test: eight emulated devices, no silent rank promotion, quick compilation, its results kept."""

import os
import tempfile
from pathlib import Path

CACHE = Path(os.environ.get("FBI_TEST_CACHE", Path(tempfile.gettempdir()) / "fbi-test-cache"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compilation is most of the time; see `optimized`
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def optimized():
    """Programs compiled as users have them, for tests of exact bits, of numbers on record, and of large models."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def package_cache(monkeypatch):
    """A cache outside the temporary folders, so that a package is downloaded once for all runs of the tests."""
    folder = Path(__file__).parents[1] / ".cache" / "tests"
    monkeypatch.setenv("FBI_CACHE", str(folder))
    return folder
