"""What a model under a policy costs: size, operations, energy of its arithmetic, memory of training; all analytic."""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax

from fbi.analysis.active import TokenBits, check_sparsity, token_bits
from fbi.analysis.energy import NOTHING, PICOJOULES, Energy, Number, product_energy
from fbi.errors import InputError
from fbi.model.config import ModelConfig, count_parameters, linear_shapes, router_shapes
from fbi.model.functional import Model
from fbi.model.taps import ROUTER
from fbi.policy import NONE, Policy, Report, Row
from fbi.quant import Method

PAPER_BITS = 16.0  # in which papers count what is not quantized
_ATTENTION = ("attn.kv", "attn.probs")
ROUTER_PRODUCTS = {"thin": ".thin", "weight": ""}  # noise is for training


class Product(NamedTuple):
    """One kind of matrix product of a forward pass over `tokens` tokens, `times` of them alike."""

    site: str
    times: int
    macs: int  # multiply-adds of all of them
    weight_bits: float
    activation_bits: float
    energy: dict[int, Energy]  # joules of all of them, by process in nm

    @property
    def bit_operations(self) -> float:
        """Multiply-adds times the widths of both operands; 0 where both have 16 bits. A ternary weight has two bits."""
        widths = math.ceil(self.weight_bits) * math.ceil(self.activation_bits)
        return 0.0 if widths == PAPER_BITS**2 else float(self.macs * widths)

    @property
    def operations(self) -> float:
        """Multiply-adds in full precision plus bit operations / 64: Liu et al., Bi-Real Net, arXiv 1808.00278."""
        return self.bit_operations / 64 or float(self.macs)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of training that can be counted from shapes."""

    parameters: int
    gradients: int
    optimizer: int
    """Adam's two moments, or Bop's one for the latents of the blocks."""
    activations: int
    """Kept for the backward pass of one sequence; see `activation_bytes`."""
    logits: int
    """Of one sequence and their gradient, in float32."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Everything that `fbi cost` prints."""

    config: ModelConfig
    policy: Policy
    tokens: int
    report: Report
    products: tuple[Product, ...]
    memory: Memory
    sparsity: float = 0.0

    @property
    def token_bits(self) -> TokenBits:
        """Of the blocks, what decoding a token reads at this sparsity."""
        return token_bits(self.config, self.policy, self.sparsity)

    @property
    def router_share(self) -> float:
        """Multiply-adds of the routers over those of the MLPs with every expert on; 0 where there are none."""
        maps = (math.prod(shape) for name, shape in router_shapes(self.config).items() if name in ROUTER_PRODUCTS)
        return sum(maps) / (len(_mlp_sites(self.config)) * self.config.ff * self.config.dim)

    @property
    def paper_bytes(self) -> float:
        """Of the whole model as papers count it: codes and 16-bit scales, 16 bits for all else: norms, routers."""
        weights = sum(row.bits.paper for row in self.report.rows if row.bits)
        return (weights + PAPER_BITS * self._beside) / 8

    @property
    def stored_bytes(self) -> int:
        """Of the whole model in a file: packed codes, scales and all else at the width they are computed in."""
        return self.report.stored_bytes + 4 * self._beside

    @property
    def _beside(self) -> int:
        """Parameters at no site."""
        count = count_parameters(self.config)
        return count.norm + count.router

    def energy(self, nm: int) -> Energy:
        """Joules of the arithmetic of all products; data movement is left out."""
        return sum((product.energy[nm] for product in self.products), NOTHING)

    @property
    def macs(self) -> int:
        """Multiply-adds of all products."""
        return sum(product.macs for product in self.products)

    @property
    def bit_operations(self) -> float:
        """Of all products that have a quantized operand."""
        return sum(product.bit_operations for product in self.products)

    @property
    def operations(self) -> float:
        """Of all products."""
        return sum(product.operations for product in self.products)


def cost(
    config: ModelConfig,
    policy: Policy,
    tokens: int = 512,
    *,
    wide: Number = "fp16",
    latent: Literal["adamw", "bop"] = "adamw",
    remat: bool = False,
    sparsity: float = 0.0,
) -> Cost:
    """The cost of a forward pass over one sequence of `tokens`, and of training on it.

    `sparsity` is the share of the experts of a routed model that a token skips: their products are left out of the
    forward pass (LTE, arXiv 2402.06126, table 1), those of the routers are counted; training computes all of them.

    Products of the attention (queries with keys, probabilities with values) count every pair of positions, as BitNet's
    table does. Norms, softmax, rotary positions and the lookup of the embedding are left out. `wide` is the type of
    what is not quantized, `latent` what moves the latents of the blocks, `remat` as in `Execution`.
    `InputError` for fewer than one token, or a policy or a sparsity that does not fit.
    """
    if tokens < 1:
        raise InputError(f"tokens={tokens} must be at least 1")
    check_sparsity(config, sparsity)
    model = Model(config, policy)
    report = policy.report(model)
    products = []
    for name, count, row in report.merged():
        if row.shape is None or name == "embed":
            continue
        bits = (_code(row), _width(row.methods.activation, (tokens, row.shape[0])))
        inner, outer = _active_shape(config, row, sparsity)
        products.append(_product(name, count, (tokens, inner, outer), bits, wide))
    if config.tied:
        embed, head = (next(row for row in report.rows if row.site == site) for site in ("embed", "head"))
        bits = (_code(embed), _width(head.methods.activation, (tokens, config.dim)))
        products.append(_product("head", 1, (tokens, config.dim, config.vocab), bits, wide))
    layers = f"layers.{f'0-{config.layers - 1}' if config.layers > 1 else 0}"
    for name, into in router_shapes(config).items():
        if name in ROUTER_PRODUCTS:
            site, (inner, outer) = f"{layers}.{ROUTER}{ROUTER_PRODUCTS[name]}", into
            shape = (tokens, inner, outer)
            products.insert(-1, _product(site, config.layers, shape, (PAPER_BITS, PAPER_BITS), wide))
    shape, heads = (tokens, config.head_dim, tokens), config.layers * config.heads
    cached, probs = (_attention_bits(report, site) for site in _ATTENTION)
    products.insert(-1, _product("queries x keys", heads, shape, (PAPER_BITS, cached), wide))
    products.insert(-1, _product("probs x values", heads, (tokens, tokens, config.head_dim), (cached, probs), wide))
    memory = _memory(model, tokens, latent, remat)
    return Cost(config, policy, tokens, report, tuple(products), memory, sparsity)


def _mlp_sites(config: ModelConfig) -> list[str]:
    return [site for site in linear_shapes(config) if site.startswith("mlp.")]


def _active_shape(config: ModelConfig, row: Row, sparsity: float) -> tuple[int, int]:
    """A weight [in, out] less the neurons that a token skips on average, to the next whole neuron."""
    assert row.shape is not None
    inner, outer = row.shape
    active = config.ff - round(sparsity * config.ff)
    if row.site.endswith(".mlp.down"):
        return active, outer
    return (inner, active) if ".mlp." in row.site else (inner, outer)


def _code(row: Row) -> float:
    return float(row.bits.code) if row.bits else PAPER_BITS


def _width(method: Method, shape: tuple[int, int]) -> float:
    return PAPER_BITS if method == NONE else float(method.build("activation").bits(shape).code)


def _attention_bits(report: Report, site: str) -> float:
    """The widest over the layers: they are counted together."""
    methods = [row.methods.activation for row in report.rows if row.site.endswith(site)]
    return max(_width(method, (1, 128)) for method in methods)


def _product(site: str, count: int, shape: tuple[int, int, int], bits: tuple[float, float], wide: Number) -> Product:
    options = {"weight_bits": bits[0], "activation_bits": bits[1], "wide": wide}
    energy = {nm: product_energy(*shape, nm=nm, **options) for nm in PICOJOULES}
    summed = {nm: Energy(count * e.add, count * e.mul) for nm, e in energy.items()}
    return Product(site, count, count * math.prod(shape), *bits, summed)


def activation_bytes(config: ModelConfig, tokens: int, remat: bool = False) -> int:
    """Bytes kept for the backward pass of one sequence, logits aside: a count of tensors, not of a compiler's buffers.

    Of each layer and token: inputs and outputs of both norms (4 dim), queries, keys and values, the mixed heads, gate,
    up and their product (3 ff; 2 without a gate), in the compute type; probabilities of the attention (heads x tokens)
    in float32.
    `remat` keeps the input of each layer (dim), and one layer at a time as above.
    """
    c = config
    size = {"float32": 4, "bfloat16": 2, "float64": 8}[c.dtype]
    heads = (2 * c.heads + 2 * c.kv_heads) * c.head_dim
    layer = size * (4 * c.dim + heads + (3 if c.gated else 2) * c.ff) + max(size, 4) * c.heads * tokens
    return tokens * (c.layers * size * c.dim + layer if remat else c.layers * layer)


def _memory(model: Model, tokens: int, latent: str, remat: bool) -> Memory:
    leaves = jax.tree.leaves(model.abstract())
    parameters = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    latents = leaves[0].dtype.itemsize * count_parameters(model.config).linear
    moments = 2 * parameters - (latents if latent == "bop" else 0)
    logits = 2 * 4 * tokens * model.config.vocab
    return Memory(parameters, parameters, moments, activation_bytes(model.config, tokens, remat), logits)
