"""What a GGUF file says of its architecture: numbers that have been checked, and a record of the
keys that were read, so that a note can name every other one.

llama.cpp has no way to say that something is absent but to leave its key out, and some converters
write 0 instead; of the keys in ``_ABSENT`` a 0 means just that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from llmquant.checkpoint.gguf.header import GgufFile
from llmquant.errors import CheckpointError, LayoutError

# The converter's 0 in place of a number that the model does not have.
NONE = frozenset({"attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"})
_ABSENT = frozenset(
    {
        *("expert_count", "expert_used_count", "expert_shared_count", "attention.key_length"),
        *("expert_feed_forward_length", "expert_shared_feed_forward_length"),
        *("rope.dimension_count", "rope.scaling.factor", "rope.scale_linear"),
    }
)
# Parts of keys that change what a model computes. One that nobody reads is refused, unless it says
# what would be computed without it: nothing (0), or a factor of 1.
_COMPUTING = re.compile(
    r"scale$|_pattern$|clamp|softcapping$|alibi|multiplier$|_swa$|temperature|alpha$|attn_factor$"
    r"|every_n_layers$|_interval$|_step$|activation$|parallel_residual$|shared_kv_layers$|causal$"
    r"|gating_func$|expert_group_(?:used_)?count$"
)
_OF_ONE = re.compile(
    r"(?<!attention\.)scale$|alpha$|attn_factor$|every_n_layers$|_interval$|_step$|causal$"
    r"|gating_func$|expert_group_(?:used_)?count$"
)
_FLAGS = frozenset({"expert_weights_norm", "use_parallel_residual"})
# Bounded by nothing in the file; every other whole number is the size of something in a tensor.
_UNBOUNDED = ("context_length", "sliding_window")


class Stated:
    """The metadata under the architecture's name: ``block_count`` → 30."""

    def __init__(self, model: GgufFile) -> None:
        self._model = model
        self._values = model.of_architecture()
        self._read: set[str] = set()
        self._largest = max(len(model.tensors), *(max(t.shape, default=0) for t in model.tensors.values()))  # fmt: skip

    def __iter__(self) -> Iterator[str]:
        return iter([k for k, v in self._values.items() if k not in _ABSENT or v != 0])

    def __contains__(self, key: str) -> bool:
        return key in set(self)

    def unread(self) -> list[str]:
        """Keys that say something and that nobody asked for."""
        return sorted(k for k in set(self) - self._read if not _neutral(k, self._values[k]))

    def refuse_computing(self, kind: str) -> None:
        """Refuse what nobody asked for and changes what is computed.

        Args:
            kind: the model type.

        Raises:
            LayoutError: naming it.
        """
        for key in self.unread():
            if _COMPUTING.search(key):
                raise LayoutError(
                    f"{self._model.path}: {self.name(key)} is {self._values[key]!r:.60}, which changes what the model computes and has no "
                    f"place in a {kind} config here; take the original safetensors model"
                )

    def per_layer(self, key: str, layers: int) -> list[bool] | None:
        """A flag for each layer, given as a list or as how many layers there are to one without;
        None where it is not given.

        Raises:
            CheckpointError: it is neither.
        """
        self._read.add(key)
        value = self._values.get(key)
        if value is None:
            return None
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return [not value or i % value < value - 1 for i in range(layers)]
        if isinstance(value, list) and len(value) == layers and all(v in (0, 1) for v in value):
            return [bool(v) for v in value]
        raise CheckpointError(
            f"{self._model.path}: {self.name(key)} is {value!r:.60}, neither a number nor 0 or 1 for each of {layers} layers; "
            "fetch it again, or another conversion"
        )

    def get(self, key: str) -> Any:
        """A value; None where there is none. What is said layer by layer is one number.

        Raises:
            LayoutError: it differs from layer to layer.
        """
        self._read.add(key)
        value = self._values.get(key) if key in self else None
        if not isinstance(value, list):
            return value
        if not value or any(v != value[0] for v in value):
            raise LayoutError(
                f"{self._model.path}: {self.name(key)} differs from layer to layer, which no config says"
            )
        return value[0]

    def name(self, key: str) -> str:
        """A key as it stands in the file."""
        return f"{self._model.architecture}.{key}"

    def checked(self, key: str) -> Any:
        """A value that a config takes: a flag, a positive number, a size that the file's tensors
        allow, or None.

        Raises:
            CheckpointError: naming what it is instead.
            LayoutError: it differs from layer to layer.
        """
        if key in _FLAGS:
            return self._expect(key, "true or false", lambda v: isinstance(v, bool))
        if key in NONE and self.get(key) == 0:
            return None
        if key.endswith(("_epsilon", "_softcapping")) or key.startswith("rope.freq_base"):
            return self.number(key)
        return self.count(key)

    def number(self, key: str) -> Any:
        """A positive finite number, or None; raises as :meth:`checked` does."""
        return self._expect(key, "a positive number", _positive)

    def count(self, key: str) -> Any:
        """A positive whole number, or None; raises as :meth:`checked` does."""
        found = self._expect(
            key, "a positive whole number", lambda v: isinstance(v, int) and _positive(v)
        )
        if found is not None and found > self._largest and not key.endswith(_UNBOUNDED):
            raise CheckpointError(
                f"{self._model.path}: {self.name(key)} is {found}, more than any tensor of the file has; "
                "fetch it again, or another conversion"
            )
        return found

    def _expect(self, key: str, what: str, right: Any) -> Any:
        value = self.get(key)
        if value is not None and not right(value):
            raise CheckpointError(
                f"{self._model.path}: {self.name(key)} is {value!r:.60}, not {what}; fetch it again, or another conversion"
            )
        return value


def _positive(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0  # type: ignore[arg-type,operator]


def _neutral(key: str, value: Any) -> bool:
    """Whether a key that changes what is computed changes nothing."""
    if not _COMPUTING.search(key):
        return False
    values = value if isinstance(value, list) else [value]
    without = (1,) if key.endswith("causal") else (0, 1) if _OF_ONE.search(key) else (0,)
    return all(v in without for v in values)
