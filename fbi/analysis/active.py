"""Bits of weights that decoding reads for a token: those of a policy, less the experts that routers leave out."""

from typing import NamedTuple

from fbi.errors import InputError
from fbi.model.config import ModelConfig, count_parameters
from fbi.model.functional import sites_of
from fbi.policy import Methods, Policy

ROUTER_BITS = 16, 32  # of a number of a router: in print, and in a file


class TokenBits(NamedTuple):
    """Of the matrices of the blocks and their routers, for one token; `weights` counts the matrices alone."""

    weights: int
    paper: float
    stored: float

    @property
    def per_weight(self) -> tuple[float, float]:
        """Paper and stored bits for each weight of the blocks, active or not."""
        return self.paper / self.weights, self.stored / self.weights


def check_sparsity(config: ModelConfig, sparsity: float) -> None:
    """Refuses a share of skipped experts that is none, or that a dense model cannot have."""
    if not 0 <= sparsity <= 1:
        raise InputError(f"sparsity={sparsity} is no share of experts; it must be at least 0 and at most 1")
    if sparsity and not config.expert:
        raise InputError(f"sparsity={sparsity} needs experts, and model.expert=0 has none; set model.expert")


def token_bits(config: ModelConfig, policy: Policy, sparsity: float = 0.0) -> TokenBits:
    """The bits that one token reads where routers leave out the share `sparsity` of the experts.

    Every weight of the attention, the MLP's times the share of active experts (codes and scales as the policy stores
    them), and all of the routers, which are in full precision: about 1 % of an MLP's weights in LTE (arXiv 2402.06126,
    section 5), and a sixth of its bits where those weights have one bit. `sparsity` 0 is what is stored.
    `InputError` for a sparsity outside [0, 1] or above 0 in a dense model.
    """
    check_sparsity(config, sparsity)
    sites, paper, stored = sites_of(config), 0.0, 0.0
    bound = policy.bind(sites, config.layers)
    for site in sites:
        if site.weight and site.name.startswith("layers."):
            share = 1 - sparsity if ".mlp." in site.name else 1.0
            bits = bound.get(site.name, Methods()).weight.build("weight").bits(site.weight)
            paper, stored = paper + share * bits.paper, stored + share * 8 * bits.stored
    count = count_parameters(config)
    return TokenBits(count.linear, paper + ROUTER_BITS[0] * count.router, stored + ROUTER_BITS[1] * count.router)
