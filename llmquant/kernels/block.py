"""A Llama-like decoder block in two compiled calls, instead of some sixty torch operations.

With one sequence and one new token the linears of a small model take less time than what stands
between them: norms, rotary embedding, attention over a few hundred rows, residuals, and Python's
share of calling all that. With many rows, a prompt or several sequences, torch's attention and what
reads and writes the hidden states once more for each small operation take a third of the time.
:class:`Step` does the block as csrc/cpu does its linears, in float32 inside whatever the dtype
outside; between its two halves the caller adds keys and values to the cache.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.kernels import native
from llmquant.kernels.base import Prepared
from llmquant.kernels.native import TYPES, Packed
from llmquant.runtime.native_library import library
from llmquant.spec import QuantSpec

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
_ADDRESSES = {"_before", "_after", "_strides", "_words", "_block", "_address"}
_VECTORS = ("q_bias", "k_bias", "v_bias", "o_bias", "q_norm", "k_norm", "input_norm", "post_norm")


class _Block(ctypes.Structure):
    """``llmquant::Block`` of csrc/cpu/api.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*LINEARS, *_VECTORS)),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "head_dim")),
        *((name, ctypes.c_float) for name in ("eps", "scaling")),
    ]


class _Seen(ctypes.Structure):
    """``llmquant::Seen`` of csrc/cpu/block.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        ("count", ctypes.c_int64),
        ("strides", ctypes.c_int64 * 6),
        ("mask", ctypes.c_void_p),
        ("mask_strides", ctypes.c_int64 * 2),
    ]


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Numbers of a block that its tensors do not say; ``scaling`` multiplies the scores before the
    softmax."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    scaling: float


class Step:
    """A block ready to be stepped.

    Args:
        linears: ``LINEARS`` → the buffers of kernel ``cpu``, the grid, and ``(out, in)``.
        vectors: biases and norm weights by name, None or absent where the model has none.
    """

    def __init__(
        self,
        linears: Mapping[str, tuple[Prepared, QuantSpec, tuple[int, int]]],
        vectors: Mapping[str, Tensor | None],
        shape: BlockShape,
    ) -> None:
        self._buffers = {name: buffers for name, (buffers, _, _) in linears.items()}
        self._kinds = {name: (spec, size) for name, (_, spec, size) in linears.items()}
        self._vectors = {
            n: None if t is None else t.detach().to(torch.float32).contiguous()
            for n, t in vectors.items()
        }
        self.shape = shape
        self._link()

    def _link(self) -> None:
        """Take the addresses of what a call needs."""
        lib = library()
        assert lib is not None
        self._before, self._after = lib.llmquant_block_before_attention, lib.llmquant_block_after
        self._strides = (ctypes.c_int64 * 4)()
        self._words = self._buffers["q"]["words"]
        self._block = self._bind()
        self._address = ctypes.addressof(self._block)

    def _bind(self) -> _Block:
        weights = {
            name: native.bound(Packed.of(buffers, *self._kinds[name]))
            for name, buffers in self._buffers.items()
        }
        vectors = {n: None if t is None else t.data_ptr() for n, t in self._vectors.items()}
        s = self.shape
        return _Block(
            **weights, **vectors, heads=s.heads, kv_heads=s.kv_heads, head_dim=s.head_dim,
            eps=s.eps, scaling=s.scaling,
        )  # fmt: skip

    def __deepcopy__(self, memo: dict[int, object]) -> Step:
        """The step of a copied module: its addresses are those of the copied buffers."""
        made = Step.__new__(Step)
        memo[id(self)] = made
        made.__dict__.update(
            {n: copy.deepcopy(v, memo) for n, v in self.__dict__.items() if n not in _ADDRESSES}
        )
        made._link()
        return made

    def takes(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> bool:
        """Whether :meth:`before` can read these tensors as they are; follows buffers that were
        moved."""
        self.follow()
        dtype, dim = hidden.dtype, self.shape.head_dim
        return (
            dtype in TYPES
            and hidden.is_cpu
            and hidden.is_contiguous()
            and cos.dtype is dtype
            and sin.dtype is dtype
            and cos.numel() == dim
            and sin.numel() == dim
            and cos.stride(-1) == 1
            and sin.stride(-1) == 1
        )

    @property
    def address(self) -> int:
        """Of the C structure, as :meth:`takes` left it."""
        return self._address

    def before(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[1, 1, width]`` → query float32 ``[heads * head_dim]``, key and value ``[1, kv_heads,
        1, head_dim]``, rotated."""
        s = self.shape
        query = torch.empty(s.heads * s.head_dim, dtype=torch.float32)
        key = hidden.new_empty((1, s.kv_heads, 1, s.head_dim))
        value = torch.empty_like(key)
        self._before(
            native.instruction_number(), self._address, hidden.data_ptr(), cos.data_ptr(),
            sin.data_ptr(), TYPES[hidden.dtype], query.data_ptr(), key.data_ptr(),
            value.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return query, key, value

    def after(self, hidden: Tensor, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The block's output ``[1, 1, width]``; keys and values ``[1, kv_heads, n, head_dim]``."""
        out = torch.empty_like(hidden)
        if (
            keys.dtype is not hidden.dtype
            or values.dtype is not hidden.dtype
            or keys.stride(3) != 1
            or values.stride(3) != 1
        ):
            keys, values = keys.to(hidden.dtype).contiguous(), values.to(hidden.dtype).contiguous()
        strides = self._strides
        strides[0], strides[1], strides[2], strides[3] = (
            keys.stride(1),
            keys.stride(2),
            values.stride(1),
            values.stride(2),
        )
        self._after(
            native.instruction_number(), self._address, hidden.data_ptr(), query.data_ptr(),
            keys.data_ptr(), values.data_ptr(), TYPES[hidden.dtype], keys.shape[2], strides,
            out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def follow(self) -> None:
        """Take the addresses again if the buffers were moved."""
        if self._buffers["q"]["words"] is not self._words:
            self._link()

    def takes_many(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> bool:
        """Whether :meth:`before_many` and :meth:`after_many` can read these tensors as they are:
        hidden ``[sequences, tokens, width]``, angles of one sequence or of each, mask bool
        ``[1 or sequences, 1, tokens, n]``."""
        self.follow()
        sequences, tokens = hidden.shape[:2]
        angles = {(n, tokens, self.shape.head_dim) for n in (1, sequences)}
        return (
            hidden.dtype in TYPES
            and hidden.is_cpu
            and hidden.is_contiguous()
            and hidden.shape[2] == self._kinds["q"][1][1]
            and all(
                t.dtype is hidden.dtype and tuple(t.shape) in angles and t.is_contiguous()
                for t in (cos, sin)
            )
            and cos.shape == sin.shape
            and (
                mask is None
                or (
                    mask.dtype is torch.bool
                    and mask.is_cpu
                    and mask.dim() == 4
                    and mask.shape[1:3] == (1, tokens)
                    and mask.shape[0] in (1, sequences)
                    and mask.stride(3) == 1
                )
            )
        )

    def before_many(
        self, hidden: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``[sequences, tokens, width]`` → query float32 ``[rows, heads * head_dim]``, key and
        value ``[sequences, kv_heads, tokens, head_dim]``, rotated."""
        s = self.shape
        sequences, tokens = hidden.shape[:2]
        query = torch.empty(sequences * tokens, s.heads * s.head_dim, dtype=torch.float32)
        key = hidden.new_empty((sequences, s.kv_heads, tokens, s.head_dim))
        value = torch.empty_like(key)
        native.loaded().llmquant_prompt_before(
            native.instruction_number(), self._address, sequences, tokens, TYPES[hidden.dtype],
            hidden.data_ptr(), cos.data_ptr(), sin.data_ptr(),
            0 if cos.shape[0] == 1 else tokens * s.head_dim, query.data_ptr(), key.data_ptr(),
            value.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return query, key, value

    def after_many(
        self, hidden: Tensor, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> Tensor:
        """The block's output; keys and values ``[sequences, kv_heads, n, head_dim]``. Overwrites
        the query.

        Args:
            mask: which of the n keys each token sees; None: its own and those before it, where the
                last token's is the last.
        """
        if mask is not None and mask.shape[3] != keys.shape[2]:
            raise ValueError(f"a mask of {mask.shape[3]} keys was given for {keys.shape[2]}")
        dtype = hidden.dtype
        if any(t.dtype is not dtype or t.stride(3) != 1 for t in (keys, values)):
            keys, values = keys.to(dtype).contiguous(), values.to(dtype).contiguous()
        seen = _Seen(
            keys.data_ptr(),
            values.data_ptr(),
            keys.shape[2],
            (ctypes.c_int64 * 6)(*keys.stride()[:3], *values.stride()[:3]),
            None if mask is None else mask.data_ptr(),
        )
        if mask is not None:
            seen.mask_strides[0] = 0 if mask.shape[0] == 1 else mask.stride(0)
            seen.mask_strides[1] = mask.stride(2)
        out = torch.empty_like(hidden)
        native.loaded().llmquant_prompt_after(
            native.instruction_number(), self._address, *hidden.shape[:2], TYPES[dtype],
            hidden.data_ptr(), query.data_ptr(), ctypes.byref(seen), out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return out
