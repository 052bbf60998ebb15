"""The published methods, each a few lines that name its choices: transform, scale, grid, surrogate."""

from fbi.quant.methods import baselines as baselines
from fbi.quant.methods import binary as binary
from fbi.quant.methods import bitnet as bitnet
from fbi.quant.methods import classical as classical
from fbi.quant.methods import language as language
from fbi.quant.methods import learned as learned
from fbi.quant.methods import quest as quest
from fbi.quant.methods import transformer as transformer
