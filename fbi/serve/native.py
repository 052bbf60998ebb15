"""The sparse feed-forward layer as a C++ kernel of this package, compiled on first use for the machine at hand."""

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fbi.errors import InputError
from fbi.files import cache_root, content_hash, whole_directory
from fbi.serve.packed import ACTIVATIONS, Packed

SOURCE = Path(__file__).with_name("sparse_ffn.cc")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared")
NUMBERS = {"silu": 0, "relu": 1, "relu2": 2}  # as in the source
WEIGHTS = ("float32", "bfloat16")


def compiler() -> str | None:
    """`$CXX`, or the first of c++, g++ and clang++ on the path."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def _processor() -> str:
    """What `-march=native` depends on: a cache folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kept = sorted({line for line in lines if line.startswith(("flags", "model name", "Features", "CPU part"))})
    return "\n".join([platform.machine(), platform.processor(), *kept])


def build(command: str) -> Path:
    """The compiled library, from the cache where source, compiler, flags and processor are the same.

    Raises `RuntimeError` with the compiler's first line where it fails, `InputError` where the cache is not writable.
    """
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout
    facts = [SOURCE.read_text(), command, version, FLAGS, _processor(), jax.__version__]
    folder = cache_root() / "kernels" / f"sparse_ffn-{content_hash(facts, 16)}"
    library = folder / "sparse_ffn.so"
    if not library.exists():
        with whole_directory(folder) as fresh:
            line = [command, *FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(fresh / library.name)]
            done = subprocess.run(line, capture_output=True, text=True, check=False)
            if done.returncode:
                said = [row for row in done.stderr.splitlines() if "error" in row] or [f"exit code {done.returncode}"]
                raise RuntimeError(said[0])
    return library


@functools.cache
def target() -> str | None:
    """The name under which XLA knows the kernel, built and registered at the first call.

    Where it cannot be, None, and one line printed that says why.
    """
    command = compiler()
    try:
        if command is None:
            raise RuntimeError("no C++ compiler found ($CXX, c++, g++, clang++)")
        path = str(build(command))
        library = ctypes.CDLL(path)
    except (RuntimeError, InputError, OSError) as error:
        print(f"fbi: sparse_ffn runs without its C++ kernel: {error}", file=sys.stderr)
        return None
    name = f"fbi_sparse_ffn_{content_hash(path, 8)}"  # a process may load it from two caches, XLA takes a name once
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(library.fbi_sparse_ffn), platform="cpu")
    return name


def available() -> bool:
    """Whether the kernel can be used here."""
    return target() is not None


def takes(packed: Packed) -> bool:
    """Whether the kernel reads weights of this type."""
    return packed.down.dtype.name in WEIGHTS


def called(
    x: Float[Array, "t d"],
    packed: Packed,
    active: Bool[Array, "t n"],
    activation: str,
    first: Int[Array, ""],
    cap: int | None = None,
) -> Float[Array, "t d"]:
    """Reads the union of the experts of each 16 rows once, and computes each for the rows it is active for; float32.

    Runs on XLA's own threads. Beyond 16 rows weights are read again for every 16: for prompts, a dense product is
    the better choice. `InputError` where there is no compiler, or weights are neither float32 nor bfloat16.
    """
    del cap
    if (name := target()) is None:
        raise InputError("method='native' needs a C++ compiler; install one or set CXX, or use method='loop'")
    if not takes(packed):
        raise InputError(f"method='native' reads {' or '.join(WEIGHTS)} weights, not {packed.down.dtype}; use 'loop'")
    gate = packed.up if packed.gate is None else packed.gate
    call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(x.shape, jnp.float32), vmap_method="sequential")
    return call(
        x.astype(jnp.float32), gate, packed.up, packed.down, active, first.reshape(1),
        activation=np.int64(NUMBERS[activation]), gated=packed.gate is not None,
    )  # fmt: skip


assert NUMBERS.keys() == ACTIVATIONS.keys()
