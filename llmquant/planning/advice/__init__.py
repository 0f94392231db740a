"""What to do with a model on a machine, before anything is done: ``llmquant advise``."""

from llmquant.planning.advice.advise import ORIGINAL, Advice, Option, advise
from llmquant.planning.advice.kinds import OtherKind, other_kind
from llmquant.planning.advice.target import Target, this_target

__all__ = [
    "ORIGINAL",
    "Advice",
    "Option",
    "OtherKind",
    "Target",
    "advise",
    "other_kind",
    "this_target",
]
