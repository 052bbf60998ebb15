"""The sparse feed-forward layer: every formulation computes the masked sum, and only reads what is active."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbi.errors import InputError
from fbi.serve import native
from fbi.serve.ffn import METHODS, chosen, packed_ffn, sparse_ffn
from fbi.serve.packed import ACTIVATIONS, Packed, masked_ffn, pack, stack

D, FF, EXPERT = 48, 160, 32  # five experts; 48 is no multiple of a TPU's or an AVX-512 machine's tile of columns
RUNS = ["gather", "loop", "native"]


@pytest.fixture(scope="module", autouse=True)
def kernel_folder(tmp_path_factory):
    """The kernel is built once, in a cache of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FBI_CACHE", str(tmp_path_factory.mktemp("cache")))
        native.target.cache_clear()
        yield
    native.target.cache_clear()


@pytest.fixture(autouse=True)
def _needs_compiler(request):
    if "native" in request.node.name and native.compiler() is None:
        pytest.skip("no C++ compiler on this machine")


def layer(seed, t, *, gated=True, d=D, ff=FF, dtype="float32"):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    return draw(t, d), draw(d, ff) if gated else None, draw(d, ff), draw(ff, d)


def mask(seed, t, share, n=FF // EXPERT):
    return jnp.asarray(np.random.default_rng(seed).random((t, n)) < share)


def close(y, want, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=0, atol=tolerance * np.abs(want).max() + 1e-30)


def by_hand(x, gate, up, down, active, activation, expert=EXPERT):
    """The definition in numpy and float64, expert by expert and row by row."""
    act = {"silu": lambda z: z / (1 + np.exp(-z)), "relu": lambda z: np.maximum(z, 0),
           "relu2": lambda z: np.maximum(z, 0) ** 2}[activation]  # fmt: skip
    x, up, down = (np.asarray(a, np.float64) for a in (x, up, down))
    y = np.zeros_like(x)
    for row, e in zip(*np.nonzero(np.asarray(active)), strict=True):
        own = slice(e * expert, (e + 1) * expert)
        h = act(x[row] @ up[:, own]) if gate is None else act(x[row] @ np.asarray(gate, np.float64)[:, own]) * (
            x[row] @ up[:, own]
        )  # fmt: skip
        y[row] += h @ down[own]
    return y


def test_the_definition_by_hand():
    # One row, two experts of one neuron; silu(0) = 0, relu(2) = 2, relu2(2) = 4.
    x, up, down = jnp.array([[1.0, 2.0]]), jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 10.0], [100.0, 0.0]])
    gate = jnp.array([[0.0, 2.0], [1.0, 0.0]])  # x gate = (2, 2), x up = (2, 2)
    first, both = jnp.array([[True, False]]), jnp.array([[True, True]])
    np.testing.assert_allclose(masked_ffn(x, None, up, down, both, "relu"), [[2 + 200, 20]])
    np.testing.assert_allclose(masked_ffn(x, None, up, down, first, "relu2"), [[4, 40]])
    np.testing.assert_allclose(masked_ffn(x, gate, up, down, first, "relu"), [[4, 40]])
    share = 1 / (1 + np.exp(-2))
    np.testing.assert_allclose(masked_ffn(x, gate, up, down, first, "silu"), [[4 * share, 40 * share]], rtol=1e-6)


@pytest.mark.parametrize("method", RUNS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_every_formulation_is_the_masked_sum(method, activation, gated):
    weights, active = layer(0, 5, gated=gated), mask(1, 5, 0.5)
    want = by_hand(*weights, active, activation)
    close(masked_ffn(*weights, active, activation), want)
    close(sparse_ffn(*weights, active, EXPERT, activation, method), want)


@pytest.mark.parametrize("method", RUNS)
@pytest.mark.parametrize("t", [1, 2, 16, 37])
def test_any_batch_and_any_mask(method, t):
    x, *weights = layer(t, t)
    packed = pack(*weights, EXPERT)
    run = jax.jit(lambda active: packed_ffn(x, packed, active, method=method))
    for share in (0.0, 0.2, 0.7, 1.0):
        active = mask(t, t, share)
        close(run(active), by_hand(x, *weights, active, "silu"))


@pytest.mark.parametrize("method", RUNS)
@pytest.mark.parametrize(("d", "ff", "expert"), [(48, 160, 16), (20, 36, 12), (7, 30, 5), (33, 80, 40), (64, 3, 1)])
def test_any_width_of_layer_and_expert(method, d, ff, expert):
    x, *weights = layer(3, 9, d=d, ff=ff)
    active = mask(3, 9, 0.6, ff // expert)
    want = by_hand(x, *weights, active, "silu", expert)
    close(sparse_ffn(x, *weights, active, expert, method=method), want)


def test_skipped_experts_are_not_read():
    x, *weights = layer(0, 3)
    active = jnp.asarray([[True, False, True, False, False]] * 3).at[0, 0].set(False)
    packed = pack(*weights, EXPERT)
    unread = jax.tree.map(lambda w: w.at[jnp.array([1, 3, 4])].set(jnp.nan), packed)
    for method in ("loop", *(["native"] if native.compiler() else [])):
        close(packed_ffn(x, unread, active, method=method), by_hand(x, *weights, active, "silu"))


@pytest.mark.parametrize("method", RUNS)
def test_a_layer_among_stacked_ones_is_found_by_its_first_expert(method):
    layers = [layer(seed, 2) for seed in range(3)]
    packed = stack([pack(*weights, EXPERT) for _, *weights in layers])
    x, active = layers[0][0], mask(5, 2, 0.5)

    @jax.jit
    def through(x):
        step = lambda x, i: (packed_ffn(x, packed, active, method=method, first=i * 5) * 1e-3, None)
        return jax.lax.scan(step, x, jnp.arange(3))[0]

    want = np.asarray(x, np.float64)
    for _, *weights in layers:
        want = 1e-3 * by_hand(want, *weights, active, "silu")
    close(through(x), want)


@pytest.mark.parametrize("cap", [1, 3, 4, 5, 9])
def test_a_cap_changes_no_result(cap):
    x, *weights = layer(2, 4)
    packed = pack(*weights, EXPERT)
    for experts in ([0, 2, 4], [1], [], [0, 1, 2, 3, 4]):
        active = jnp.zeros((4, 5), bool).at[jnp.arange(4)[:, None], jnp.array(experts, int)].set(True)
        y = packed_ffn(x, packed, active, method="gather", cap=cap)
        close(y, by_hand(x, *weights, active, "silu"))


@pytest.mark.parametrize("method", RUNS)
def test_bfloat16_weights_are_read_as_they_are(method):
    x, *weights = layer(4, 6)
    narrow = [w.astype("bfloat16") for w in weights]
    active = mask(4, 6, 0.6)
    want = by_hand(x, *(np.asarray(w, np.float32) for w in narrow), active, "silu")
    y = packed_ffn(x, pack(*narrow, EXPERT), active, method=method)
    assert y.dtype == jnp.float32
    close(y, want)
    half = packed_ffn(x.astype("bfloat16"), pack(*narrow, EXPERT), active, method=method)
    assert half.dtype == jnp.bfloat16
    close(half, want, 0.03)


def test_native_gives_the_same_bits_at_every_call():
    # 64 rows of experts of a megabyte: several chunks, taken by whichever thread is free.
    x, *weights = layer(0, 3, d=512, ff=2048)
    packed, active = pack(*weights, EXPERT), mask(0, 3, 0.7, 64)
    run = jax.jit(lambda: packed_ffn(x, packed, active, method="native"))
    first = np.asarray(run())
    assert all(np.array_equal(run(), first) for _ in range(10))
    close(first, by_hand(x, *weights, active, "silu"))


def test_native_under_a_mesh_of_one_device_and_vmap():
    x, *weights = layer(0, 4)
    packed, active = pack(*weights, EXPERT), mask(0, 4, 0.5)
    want = by_hand(x, *weights, active, "silu")
    with jax.set_mesh(jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1])):
        close(jax.jit(lambda x: packed_ffn(x, packed, active, method="native"))(x), want)
    one = lambda x, active: packed_ffn(x[None], packed, active[None], method="native")[0]
    close(jax.vmap(one)(x, active), want)


def test_native_is_built_once_into_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FBI_CACHE", str(tmp_path))
    library = native.build(native.compiler())
    assert library.parent.parent == tmp_path / "kernels"
    stamp = library.stat().st_mtime_ns
    assert native.build(native.compiler()) == library
    assert library.stat().st_mtime_ns == stamp
    assert [path.name for path in library.parent.iterdir()] == ["sparse_ffn.so"]
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-no-such-flag"))
    with pytest.raises(RuntimeError, match="no-such-flag"):
        native.build(native.compiler())
    assert [path.name for path in (tmp_path / "kernels").iterdir()] == [library.parent.name]  # nothing half made


def test_without_a_compiler_one_line_is_printed_and_the_loop_runs():
    program = (
        "import jax.numpy as jnp\nfrom fbi.serve.ffn import chosen, sparse_ffn\n"
        "one = jnp.ones\n"
        "args = (one((1, 8)), one((8, 32)), one((8, 32)), one((32, 8)), one((1, 1), bool))\n"
        "print(chosen('auto'), chosen('auto'), float(sparse_ffn(*args, activation='relu')[0, 0]))"
    )
    environment = {"PATH": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "loop loop 2048.0\n"  # 32 neurons of 8 * 8
    lines = [line for line in done.stderr.splitlines() if line.startswith("fbi:")]
    assert lines == ["fbi: sparse_ffn runs without its C++ kernel: no C++ compiler found ($CXX, c++, g++, clang++)"]


def test_auto_chooses_by_platform():
    assert chosen("auto", "tpu") == "pallas"
    assert chosen("auto", "gpu") == "gather"
    assert chosen("auto", "cpu") in ("native", "loop")
    assert {chosen(name) for name in METHODS} == set(METHODS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "fast"}, "unknown method 'fast'; valid: auto, gather, loop, native, pallas"),
        ({"activation": "gelu"}, "unknown activation 'gelu'"),
        ({"expert": 16}, "active [2, 5] and expert=16 do not make 160 neurons; active is [2, 10]"),
    ],
)
def test_wrong_names_and_shapes_say_what_is_right(change, message):
    with pytest.raises(InputError, match=re.escape(message)):
        sparse_ffn(*layer(0, 2), mask(0, 2, 1.0), **{"expert": 32, **change})


def test_wrong_packing_says_what_is_right():
    x, *weights = layer(0, 2)
    rows = pack(*weights, EXPERT, "rows")
    with pytest.raises(InputError, match=re.escape("reads [5, 48, 32]; pack with layout='columns'")):
        packed_ffn(x, rows, mask(0, 2, 1.0), method="loop")
    with pytest.raises(InputError, match=re.escape("expert=7 does not divide the 160 neurons")):
        pack(*weights, 7)
    with pytest.raises(InputError, match=re.escape("x is [t, 48], active [t, 5]")):
        packed_ffn(x[:1], pack(*weights, EXPERT), mask(0, 2, 1.0), method="loop")
    with pytest.raises(InputError, match="unknown layout 'row'"):
        pack(*weights, EXPERT, "row")
    assert isinstance(rows, Packed)
