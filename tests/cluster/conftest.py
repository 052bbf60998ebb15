"""The undisturbed sweep that the others are compared with."""

import os

import cluster_support as support
import pytest

os.environ.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)  # for all the processes alike: not every service passes it on


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return support.write_corpus(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def reference(corpus, tmp_path_factory):
    """The folder of the sweep as this machine carries it out, two runs at a time."""
    root = tmp_path_factory.mktemp("reference") / "sweep"
    with support.Sweep(root, "local:slots=2", corpus) as sweep:
        assert sweep.end() == 0, sweep.words
    assert len(support.directories(root)) == support.RUNS
    return root
