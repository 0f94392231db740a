"""Rounding algorithms: pure functions from a weight (and input statistics) to a QuantizedWeight."""

from llmquant.algorithms.asymmetric import asymmetric_target
from llmquant.algorithms.awq import AWQOptions, Scaled, search_scale
from llmquant.algorithms.descent import descend
from llmquant.algorithms.gptq import Factor, GPTQOptions, factorize, gptq, layer_error
from llmquant.algorithms.grid import MINMAX, ScaleSearch, fit, round_to_codes
from llmquant.algorithms.rtn import rtn
from llmquant.algorithms.smooth import Reader, search_smoothing
from llmquant.algorithms.tune import Tuned, TuneOptions, tune

__all__ = [
    "MINMAX",
    "AWQOptions",
    "Factor",
    "GPTQOptions",
    "Reader",
    "ScaleSearch",
    "Scaled",
    "TuneOptions",
    "Tuned",
    "asymmetric_target",
    "descend",
    "factorize",
    "fit",
    "gptq",
    "layer_error",
    "round_to_codes",
    "rtn",
    "search_scale",
    "search_smoothing",
    "tune",
]
