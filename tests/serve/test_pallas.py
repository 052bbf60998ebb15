"""The Pallas kernel: right in interpret mode, and machine code for a TPU where its compiler is installed."""

import functools
import importlib.util
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from fbi.serve.ffn import METHODS, packed_ffn
from fbi.serve.packed import masked_ffn, pack, stack
from fbi.serve.pallas_tpu import tiled

D, FF, EXPERT = 128, 96, 32


def layer(seed, t, gated=True):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return draw(t, D), draw(D, FF) if gated else None, draw(D, FF), draw(FF, D)


@pytest.mark.parametrize(
    ("t", "experts", "gated", "cap"),
    [
        (1, [0, 2], True, None),
        (3, [], True, None),
        (9, [0, 1, 2], False, None),
        (2, [1], True, 2),
        (2, [0, 2], True, 1),
    ],
)
def test_the_kernel_is_the_masked_sum(t, experts, gated, cap):
    x, *weights = layer(t, t, gated)
    active = jnp.zeros((t, 3), bool).at[:, jnp.array(experts, int)].set(True)
    if t > 2 and experts:
        active = active.at[0, experts[0]].set(False)
    packed = stack([pack(*layer(7, t, gated)[1:], EXPERT, "rows"), pack(*weights, EXPERT, "rows")])
    y = tiled(x, packed, active, "silu", jnp.int32(3), cap, interpret=True)
    want = masked_ffn(x, *weights, active)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()) + 1e-30)


def test_more_rows_than_a_tile_go_in_blocks(monkeypatch):
    few = METHODS["pallas"]._replace(apply=functools.partial(tiled, interpret=True), most=4)
    monkeypatch.setitem(METHODS, "pallas", few)
    x, *weights = layer(5, 9)
    active = jnp.asarray(np.random.default_rng(5).random((9, 3)) < 0.5)
    y = packed_ffn(x, pack(*weights, EXPERT, "rows"), active, method="pallas")
    want = masked_ffn(x, *weights, active)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))


PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from fbi.serve.packed import Packed
from fbi.serve.pallas_tpu import tiled

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
place = jax.sharding.SingleDeviceSharding(devices[0])
for dtype, t in (("bfloat16", 1), ("float32", 16)):
    shape = lambda *s, kind=dtype: jax.ShapeDtypeStruct(s, kind, sharding=place)
    w = shape(344, 32, 4096)
    args = (shape(t, 4096), Packed(w, w, w), shape(t, 344, kind="bool"), shape(kind="int32"))
    step = jax.jit(lambda x, p, active, first: tiled(x, p, active, "silu", first))
    compiled = step.trace(*args).lower(lowering_platforms=("tpu",)).compile()
    memory = compiled.memory_analysis()
    assert "tpu_custom_call" in compiled.as_text()
    print(dtype, memory.argument_size_in_bytes, memory.temp_size_in_bytes)
"""


def test_it_compiles_for_a_tpu_without_copying_weights():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, which holds the TPU compiler, is not installed (pip install libtpu)")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
                                "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "PYTHONPATH": ":".join(sys.path)}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for line, width in zip(done.stdout.splitlines(), (2, 4), strict=True):
        _, arguments, temporary = line.split()
        weights = 3 * 344 * 32 * 4096 * width
        assert weights <= int(arguments) < 1.01 * weights  # nothing is padded
        assert int(temporary) < 0.01 * weights
