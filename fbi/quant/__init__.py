"""Quantizers of one tensor: small parts that compose into the published methods. Depends on jax alone."""

from fbi.quant import methods as methods
from fbi.quant.quantizer import BitReport as BitReport
from fbi.quant.quantizer import Encoded as Encoded
from fbi.quant.quantizer import Quantizer as Quantizer
from fbi.quant.quantizer import compose as compose
from fbi.quant.quantizer import decode as decode
from fbi.quant.quantizer import packed as packed
from fbi.quant.quantizer import paired as paired
from fbi.quant.quantizer import unpacked as unpacked
from fbi.quant.registry import REGISTRY as REGISTRY
from fbi.quant.registry import Method as Method
from fbi.quant.registry import quantizer as quantizer
from fbi.quant.scale import QParams as QParams
from fbi.quant.ste import Ctx as Ctx
