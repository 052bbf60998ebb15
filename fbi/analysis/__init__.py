"""What goes on in a low-bit model (flips, entropy, margins, outliers, gradients), and what it costs."""

from fbi.lazy import lazy_names

_CODES, _COST = "fbi.analysis.codes", "fbi.analysis.cost"
__getattr__ = lazy_names(
    "fbi.analysis",
    {
        "Ratio": _CODES,
        "flips": _CODES,
        "entropy": _CODES,
        "half_step": _CODES,
        "margin": _CODES,
        "near_threshold": _CODES,
        "relative_error": _CODES,
        "masked": _CODES,
        "activation_statistics": "fbi.analysis.activations",
        "gradient_alignment": "fbi.analysis.gradients",
        "without_activations": "fbi.analysis.gradients",
        "Diagnostics": "fbi.analysis.diagnostics",
    },
)
