"""Rounding algorithms: pure functions from a weight (and input statistics) to a QuantizedWeight."""

from llmquant.algorithms.awq import AWQOptions, Scaled, search_scale
from llmquant.algorithms.block_tuning import Tuned, TuneOptions, tune
from llmquant.algorithms.coordinate_descent import descend
from llmquant.algorithms.gptaq import asymmetric_target
from llmquant.algorithms.gptq import Factor, GPTQOptions, factorize, gptq, layer_error
from llmquant.algorithms.rtn import rtn
from llmquant.algorithms.scale_search import MINMAX, ScaleSearch, fit, round_to_codes
from llmquant.algorithms.smoothquant import Reader, search_smoothing

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
