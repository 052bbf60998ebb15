"""Model shapes: one frozen dataclass, the presets by name, and exact parameter counts. Imports no jax."""

import dataclasses
import math
from typing import Literal

from fbi.errors import InputError, unknown
from fbi.fields import later


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama type. Defaults are FBI-LLM's: pre-norm RMSNorm, SwiGLU, RoPE, no bias, untied head."""

    vocab: int = 1024
    """Rows of the embedding, columns of the head."""
    dim: int = 128
    """Width of the residual stream."""
    layers: int = 2
    """Blocks."""
    heads: int = 4
    """Query heads."""
    kv_heads: int = 4
    """Key and value heads; fewer than `heads` is grouped-query attention."""
    head_dim: int = 32
    """Width of a head."""
    ff: int = 256
    """Neurons of the MLP."""
    context: int = 2048
    """Most positions a sequence may have."""
    activation: Literal["silu", "relu2", "relu"] = "silu"
    """Of the MLP: SwiGLU, ReLU²-GLU as in BitNet a4.8 and 2B4T, or ReLU."""
    norm: Literal["pre", "inner", "sub"] = "pre"
    """RMSNorm before attention and MLP; inside each linear layer instead (BitNet FAQ); or before, and again before the
    output and down projections (SubLN, BitNet 2B4T)."""
    tied: bool = False
    """The head is the transposed embedding."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of the normal initialisation."""
    residual_init: bool = False
    """Output and down projections start smaller by sqrt(2 layers), as in QuEST (2502.05003)."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Compute type. Latent weights are float32 (float64 for float64)."""
    gated: bool = later(True)
    """The MLP is down(act(gate(x)) * up(x)); false: down(act(up(x))), as in GPT-2 and RoBERTa."""
    expert: int = later(0)
    """Neurons of an expert of the MLP, 32 in LTE (2402.06126); 0: a dense MLP, without routers."""
    routing: Literal["soft", "hard", "dense", "softmax"] = later("soft")
    """What the routers do: weigh every expert by its score (LTE's stage 1), keep those above 0.5 and get no gradient
    (stage 2, serving), nothing, or weigh those chosen by their softmax (mixtures of experts, 1701.06538)."""
    router: Literal["linear", "low-rank", "noisy", "random", "oracle"] = later("linear")
    """Where the scores come from: LTE's linear map; two thin ones, as Deja Vu (2310.17157); one with learned
    noise (1701.06538); one that is never trained; or the hidden units themselves (MoEfication, 2110.01786)."""
    top_k: int = later(0)
    """Experts that every token uses, those of the highest scores; 0: as many as have scores above 0.5."""

    @property
    def experts(self) -> int:
        """Experts of each MLP; 0: it is dense."""
        return self.ff // self.expert if self.expert else 0


RANK = 8  # the width of the model over that between the maps of a low-rank router; 12 in Deja Vu's code, of 12,288
UNTRAINED = ("random", "oracle")  # routers that need no training before they choose


def _llama(vocab: int, dim: int, layers: int, heads: int, ff: int, **rest: object) -> ModelConfig:
    fields: dict = {"kv_heads": heads, "head_dim": dim // heads, **rest}
    return ModelConfig(vocab=vocab, dim=dim, layers=layers, heads=heads, ff=ff, **fields)


def _quest(dim: int, layers: int, ff: int) -> ModelConfig:
    return _llama(32_000, dim, layers, dim // 128, ff, context=512, residual_init=True)


PRESETS: dict[str, ModelConfig] = {
    # Sized for two CPU cores; widths are multiples of 128.
    "nano": _llama(1024, 128, 2, 4, 256, context=512),
    "micro": _llama(4096, 256, 6, 8, 768, context=1024),
    # FBI-LLM, arXiv 2407.07093, table 1.
    "fbi-130m": _llama(32_000, 768, 12, 12, 2048),
    "fbi-1.3b": _llama(32_000, 2048, 24, 32, 5632),
    "fbi-7b": _llama(32_000, 4096, 32, 32, 11_008),
    # BitNet b1.58, arXiv 2402.17764; shapes from BitNet a4.8, 2411.04965, appendix; SubLN as in its public checkpoints.
    "bitnet-700m": _llama(32_000, 1536, 24, 24, 4096, norm="sub"),
    "bitnet-1.3b": _llama(32_000, 2048, 24, 32, 5460, norm="sub"),
    "bitnet-3b": _llama(32_000, 3200, 26, 32, 8640, norm="sub"),
    # BitNet b1.58 2B4T, arXiv 2504.12285.
    "bitnet-2b4t": _llama(
        128_256, 2560, 30, 20, 6912, kv_heads=5, norm="sub", activation="relu2", tied=True, rope_base=5e5, context=4096
    ),
    # QuEST, arXiv 2502.05003, table 7: heads of 128, context 512.
    "quest-30m": _quest(640, 6, 1792),
    "quest-50m": _quest(768, 7, 2048),
    "quest-100m": _quest(1024, 8, 2816),
    "quest-200m": _quest(1280, 10, 3584),
    "quest-430m": _quest(1664, 13, 4608),
    "quest-800m": _quest(2048, 16, 5632),
    "llama2-7b": _llama(32_000, 4096, 32, 32, 11_008, context=4096),
    "smollm2-135m": _llama(49_152, 576, 30, 9, 1536, kv_heads=3, tied=True, rope_base=1e5, context=8192),
}


def preset(name: str) -> ModelConfig:
    """The model of that name; an `InputError` that lists the valid names otherwise."""
    if name not in PRESETS:
        raise unknown("model", name, PRESETS)
    return PRESETS[name]


def check(config: ModelConfig) -> None:
    """Refuses shapes that cannot be built, naming the field, its value and what would do."""
    for name in ("vocab", "dim", "layers", "heads", "kv_heads", "head_dim", "ff", "context"):
        if getattr(config, name) < 1:
            raise InputError(f"model.{name}={getattr(config, name)} must be at least 1")
    if config.heads % config.kv_heads:
        fitting = [n for n in range(1, config.heads + 1) if config.heads % n == 0]
        raise InputError(f"model.kv_heads={config.kv_heads} does not divide heads={config.heads}; use one of {fitting}")
    if config.head_dim % 2:
        raise InputError(f"model.head_dim={config.head_dim} is odd; rotary positions need an even width")
    _check_experts(config)


def _check_experts(config: ModelConfig) -> None:
    if config.expert < 0:
        raise InputError(f"model.expert={config.expert} must be at least 0 (0: a dense MLP)")
    if config.expert and config.ff % config.expert:
        fitting = [n for n in range(1, config.ff + 1) if config.ff % n == 0]
        raise InputError(f"model.expert={config.expert} does not divide ff={config.ff}; use one of {fitting}")
    for name, usual in (("routing", "soft"), ("router", "linear"), ("top_k", 0)):
        if (value := getattr(config, name)) != usual and not config.expert:
            raise InputError(f"model.{name}={value} needs experts, and model.expert=0 has none; set model.expert")
    if config.expert and not 0 <= config.top_k < config.experts:
        raise InputError(
            f"model.top_k={config.top_k} must be at least 0 and below the {config.experts} experts "
            "(0: those with scores above 0.5)"
        )
    if config.router in UNTRAINED and config.routing != "hard":
        raise InputError(
            f"model.router={config.router} is never trained, and model.routing={config.routing} is for training; "
            "use model.routing=hard"
        )
    if (config.router == "oracle" or config.routing == "softmax") and not config.top_k:
        which = "router=oracle" if config.router == "oracle" else "routing=softmax"
        raise InputError(f"model.{which} ranks experts and has no threshold; set model.top_k")


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Parameters by kind; learned scales of a policy come on top (`Model.parameter_count`)."""

    embedding: int
    head: int
    linear: int
    norm: int
    router: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.head + self.linear + self.norm + self.router

    @property
    def non_embedding(self) -> int:
        """Blocks and norms, as QuEST and the scaling-law literature count."""
        return self.linear + self.norm + self.router


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Site within a block -> [in, out]."""
    c, attention, cache = config, config.heads * config.head_dim, config.kv_heads * config.head_dim
    gate = {"mlp.gate": (c.dim, c.ff)} if c.gated else {}
    return {
        "attn.q": (c.dim, attention),
        "attn.k": (c.dim, cache),
        "attn.v": (c.dim, cache),
        "attn.o": (attention, c.dim),
        **gate,
        "mlp.up": (c.dim, c.ff),
        "mlp.down": (c.ff, c.dim),
    }


def router_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The parameters of the router of a routed MLP by name, without the norm inside it."""
    dim, n = config.dim, config.experts
    linear: dict[str, tuple[int, ...]] = {"weight": (dim, n), "bias": (n,)}
    rank = max(dim // RANK, 1)
    kinds: dict[str, dict[str, tuple[int, ...]]] = {
        "linear": linear,
        "random": linear,
        "low-rank": {"thin": (dim, rank), "weight": (rank, n), "bias": (n,)},
        "noisy": {**linear, "noise": (dim, n)},
        "oracle": {},
    }
    return kinds[config.router] if config.expert else {}


def count_parameters(config: ModelConfig) -> ParameterCount:
    """The exact counts, from the shapes alone."""
    shapes = linear_shapes(config)
    norms = {
        "pre": 2 * config.dim,
        "inner": sum(i for i, _ in shapes.values()) + (config.dim if router_shapes(config) else 0),
        "sub": 2 * config.dim + shapes["attn.o"][0] + config.ff,
    }[config.norm]
    return ParameterCount(
        embedding=config.vocab * config.dim,
        head=0 if config.tied else config.vocab * config.dim,
        linear=config.layers * sum(i * o for i, o in shapes.values()),
        norm=config.layers * norms + config.dim,
        router=config.layers * sum(math.prod(shape) for shape in router_shapes(config).values()),
    )
