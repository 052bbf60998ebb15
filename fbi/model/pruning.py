"""Pruning: weights of the MLPs set to zero by magnitude or as Wanda, one by one, N of M, by neuron or by expert.

Sun et al., A Simple and Effective Pruning Approach for Large Language Models, arXiv 2306.11695.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from fbi.errors import InputError, unknown
from fbi.model.axes import mesh_1x1
from fbi.model.config import ModelConfig
from fbi.model.functional import Params, sites_of
from fbi.policy import NONE, Policy
from fbi.quant import Method

Matrix = Float[np.ndarray, "i o"]
Mask = Bool[np.ndarray, "i o"]
INPUT = {"gate": "mlp.up", "up": "mlp.up", "down": "mlp.down"}  # matrix -> feature that is its input
FEATURES = tuple(dict.fromkeys(INPUT.values()))


def _magnitude(w: Matrix, norm: Float[np.ndarray, " i"] | None) -> Matrix:
    """|W|."""
    del norm
    return np.abs(w)


def _wanda(w: Matrix, norm: Float[np.ndarray, " i"] | None) -> Matrix:
    """|W_ij| ||X_i||_2 for W [in, out]: arXiv 2306.11695, eq. 1, X_i the i-th input over the calibration tokens."""
    assert norm is not None, "Wanda needs the norms of the inputs"
    return np.abs(w) * norm[:, None]


@dataclasses.dataclass(frozen=True)
class Criterion:
    """How much a weight counts, which weights it is compared with, and which matrices speak for a neuron."""

    score: Callable[[Matrix, Any], Matrix]
    inputs: bool
    """Whether it looks at inputs."""
    axis: int | None
    """Along which weights are ranked against each other; None: all of a matrix."""
    neuron: tuple[str, ...]


CRITERIA = {
    "magnitude": Criterion(_magnitude, False, None, ("gate", "up", "down")),
    # A row of down times the norm of its unit is what a neuron adds to the output: gate and up are in it.
    "wanda": Criterion(_wanda, True, 0, ("down",)),
}
PATTERNS = ("unstructured", "neuron", "expert", "N:M")
FORM = "write for example wanda:sparsity=0.5,pattern=expert,expert=32 or magnitude:pattern=2:4"


@dataclasses.dataclass(frozen=True)
class Pruning:
    """What is pruned away, as the text of `Run.pruning` says it."""

    criterion: str
    sparsity: float = 0.5
    """Share of the weights, neurons or experts of every layer that goes."""
    pattern: str = "unstructured"
    """unstructured; N:M, as 2:4: N of every M weights along the inputs stay; neuron; expert: neighbouring neurons."""
    expert: int = 32
    """Neurons of an expert."""

    @classmethod
    def parse(cls, text: str) -> "Pruning":
        """Reads CRITERION:OPTION=VALUE,...; an `InputError` that says what is wrong with it."""
        name, _, rest = text.strip().partition(":")
        if name not in CRITERIA:
            raise unknown("pruning", name, CRITERIA)
        given: dict[str, Any] = {}
        kinds = {"sparsity": float, "pattern": str, "expert": int}
        for part in filter(None, (p.strip() for p in rest.split(","))):
            option, _, value = part.partition("=")
            if option not in kinds:
                raise unknown("pruning option", option, kinds)
            try:
                given[option] = kinds[option](value)
            except ValueError:
                raise InputError(f"pruning={text!r}: {option}={value!r} is not a number; {FORM}") from None
        found = cls(name, **given)
        n, m = found.n_of_m
        if m:
            if not 0 < n < m or "sparsity" in given:
                raise InputError(
                    f"pruning={text!r}: {found.pattern} keeps {n} of every {m} weights, which says the sparsity; N is "
                    "above 0 and below M, and sparsity is left out"
                )
            found = dataclasses.replace(found, sparsity=1 - n / m)
        elif found.pattern not in PATTERNS[:3]:
            raise unknown("pruning pattern", found.pattern, PATTERNS)
        if not 0 < found.sparsity < 1:
            raise InputError(f"pruning={text!r}: sparsity={found.sparsity} must be above 0 and below 1")
        if found.expert < 1:
            raise InputError(f"pruning={text!r}: expert={found.expert} must be at least 1")
        return found

    @property
    def n_of_m(self) -> tuple[int, int]:
        """Of a pattern N:M the two numbers; (0, 0) of another."""
        found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        return (int(found[1]), int(found[2])) if found else (0, 0)

    @property
    def block(self) -> int:
        """Neurons that go together; 0: weights go one by one."""
        return {"neuron": 1, "expert": self.expert}.get(self.pattern, 0)

    @property
    def features(self) -> tuple[str, ...]:
        """The inputs, as `Model.features` names them, whose norms the criterion looks at."""
        return FEATURES if CRITERIA[self.criterion].inputs else ()

    def check(self, config: ModelConfig, policy: Policy) -> None:
        """Refuses a model that cannot be pruned so."""
        n, m = self.n_of_m
        if m and (wrong := [f"{name}={size}" for name, size in (("dim", config.dim), ("ff", config.ff)) if size % m]):
            raise InputError(f"pruning: {n}:{m} needs widths that are multiples of {m}, not {', '.join(wrong)}")
        if self.block and config.ff % self.block:
            fitting = [k for k in range(1, config.ff + 1) if config.ff % k == 0]
            raise InputError(f"pruning: expert={self.block} does not divide ff={config.ff}; use one of {fitting}")
        for site, methods in policy.bind(sites_of(config), config.layers).items():
            if ".mlp." in site and not _keeps_zeros(methods.weight):
                raise InputError(
                    f"pruning: {site}: w={methods.weight} has levels without a zero, which bring pruned weights back; "
                    "use policy=fp, or a grid with a zero such as bitnet-b158"
                )


@functools.cache
def _keeps_zeros(method: Method) -> bool:
    """Whether a weight quantizer leaves the zeros of a matrix as they are; asked, not listed."""
    if method == NONE:
        return True
    quantizer = method.build("weight")
    rng = np.random.default_rng(0)
    away = rng.random((128, 128)) < 0.5
    w = np.where(away, np.float32(0), rng.standard_normal((128, 128), np.float32))
    with jax.set_mesh(mesh_1x1()):
        used = quantizer.apply(jnp.asarray(w), quantizer.init(jnp.asarray(w)))
    return bool((np.asarray(used)[away] == 0).all())


def norms(x: Float[Array, "*s d"]) -> Float[Array, " d"]:
    """||X_i||_2 of each feature over all tokens: a reducer for `Model.features`."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.sqrt(jnp.sum(wide * wide, tuple(range(x.ndim - 1))))


def kept(w: Matrix, score: Matrix, pruning: Pruning) -> Mask:
    """Which weights of a matrix stay, where they go one by one."""
    n, m = pruning.n_of_m
    if m:
        groups = score.reshape(-1, m, score.shape[1])
        ranks = np.argsort(np.argsort(-groups, axis=1, kind="stable"), axis=1, kind="stable")
        return (ranks < n).reshape(w.shape)
    axis = CRITERIA[pruning.criterion].axis
    rows = score.reshape(1, -1) if axis is None else score.T  # ranked within each
    gone = np.argsort(rows, axis=1, kind="stable")[:, : round(pruning.sparsity * rows.shape[1])]
    mask = np.ones(rows.shape, bool)
    np.put_along_axis(mask, gone, False, 1)
    return mask.reshape(w.shape) if axis is None else mask.T


def prune(pruning: Pruning, params: Params, seen: Mapping[str, Float[np.ndarray, "layers _"]]) -> Params:
    """`params` with the pruned weights of every MLP at zero, layer by layer on the host; each leaf stays where it lay.

    `seen`: by layer the norms of the inputs that `pruning.features` names. Group the neurons before, where experts go.
    """
    criterion = CRITERIA[pruning.criterion]
    out = dict(params)
    for name, stack in params.items():
        if not name.startswith("layers_"):
            continue
        start = int(name.split("_")[1])
        there = [matrix for matrix in INPUT if matrix in stack["mlp"]]
        weights = {matrix: np.array(stack["mlp"][matrix]["w"]) for matrix in there}
        for i in range(len(weights["down"])):
            own = {matrix: w[i] for matrix, w in weights.items()}
            at = {matrix: seen[INPUT[matrix]][start + i] if criterion.inputs else None for matrix in there}
            scores = {matrix: criterion.score(w, at[matrix]) for matrix, w in own.items()}
            for matrix, mask in _masks(pruning, own, scores).items():
                own[matrix] *= mask
        mlp = stack["mlp"]
        changed = {matrix: mlp[matrix] | {"w": _placed(w, mlp[matrix]["w"])} for matrix, w in weights.items()}
        out[name] = stack | {"mlp": mlp | changed}
    return out


def _masks(pruning: Pruning, weights: dict[str, Matrix], scores: dict[str, Matrix]) -> dict[str, Mask]:
    """Which weights of each matrix of a layer stay."""
    if not pruning.block:
        return {matrix: kept(w, scores[matrix], pruning) for matrix, w in weights.items()}
    across = {"gate": 0, "up": 0, "down": 1}  # the axis that is not the neurons'
    used = [m for m in CRITERIA[pruning.criterion].neuron if m in weights]
    neurons = sum(np.square(scores[m], dtype=np.float64).sum(across[m]) for m in used)
    blocks = np.asarray(neurons).reshape(-1, pruning.block).sum(1)
    stays = np.ones(len(blocks), bool)
    stays[np.argsort(blocks, kind="stable")[: round(pruning.sparsity * len(blocks))]] = False
    stay = np.repeat(stays, pruning.block)
    return {m: np.broadcast_to(stay[None, :] if across[m] == 0 else stay[:, None], w.shape) for m, w in weights.items()}


def _placed(w: np.ndarray, leaf: Any) -> Any:
    return jax.device_put(w, leaf.sharding) if isinstance(leaf, jax.Array) else w


def zero_share(params: Params) -> Float[Array, ""]:
    """The share of the weights of all MLPs that are zero."""
    found = [(jnp.sum(mlp[m]["w"] == 0), mlp[m]["w"].size) for mlp in _mlps(params) for m in INPUT if m in mlp]
    return jnp.asarray(sum(zeros for zeros, _ in found) / sum(size for _, size in found))


def _mlps(params: Params) -> list[dict[str, Any]]:
    return [stack["mlp"] for name, stack in params.items() if name.startswith("layers_")]
