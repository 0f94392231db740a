"""What is said of stored tensors that the model of a config has no place for.

transformers leaves them out, so a run does too: they are carried over as they are read (weights of
multi-token prediction, a value head, an extra layer), and named. Which kind they are decides only
what is said.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from torch import nn

from llmquant.checkpoint.reader import CheckpointReader
from llmquant.runtime.finite import some

# Tables that old checkpoints carry and models compute for themselves.
_COMPUTED = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias|position_ids)$"
)
_KV_SCALE = re.compile(r"\.((q|k|v|kv)_scale|(k|v)_proj\.output_scale)$")


def computed(name: str) -> bool:
    """Whether the model computes such a tensor for itself."""
    return _COMPUTED.search(name) is not None


def leftover_notes(
    reader: CheckpointReader, model: nn.Module, names: Collection[str]
) -> Iterator[str]:
    """Sentences on tensors without a place, by their kind; tables that the model computes are
    nothing to speak of."""
    left = sorted(n for n in names if not computed(n))
    scales = [n for n in left if _KV_SCALE.search(n)]
    if scales:
        yield (
            f"{some(scales)}: scales of a quantized KV cache are kept, not used; engines that use them answer a little "
            "differently"
        )
    biases = [n for n in left if n in reader and _lacked_bias(model, n)]
    zero = [n for n in biases if not bool(reader.read(n).any())]
    if zero:
        yield f"{some(zero)}: all zero, where the model has no bias; kept, not used"
    given = [n for n in biases if n not in zero]
    if given:
        yield (
            f"{some(given)}: not zero, where config.json gives the model no bias; kept, not used, as in transformers. "
            "If they are meant, correct config.json"
        )
    rest = [n for n in left if n not in scales and n not in biases]
    if rest:
        yield f"{some(rest)}: no place in the model of config.json; kept, not used, as in transformers"


def _lacked_bias(model: nn.Module, name: str) -> bool:
    """Whether a tensor is a bias for a linear of the model that has none."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return False
    return leaf == "bias" and isinstance(module, nn.Linear) and module.bias is None
