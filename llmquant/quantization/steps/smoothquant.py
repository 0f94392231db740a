"""SmoothQuant on a block of a walked model: what the readers of each pair see, and the search among
strengths.

Two things of the block's inputs are kept: the largest magnitude of each channel over all
calibration tokens, and an even sample of at most ``_ROWS`` tokens on which candidates are compared,
so that memory does not grow with the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from llmquant.algorithms import Reader, Scaled, ScaleSearch, search_smoothing
from llmquant.errors import QuantizationError
from llmquant.models.block_inputs import BlockInput
from llmquant.models.experts import Watch
from llmquant.quantization.blocks.capture import linear_inputs
from llmquant.quantization.steps.folding import Pair
from llmquant.spec import QuantSpec

_ROWS = 2048
_AUTO = tuple(step / 10 for step in range(1, 10))


@dataclass(frozen=True, slots=True)
class SmoothOptions:
    """How strongly channels are smoothed, and where.

    Attributes:
        alpha: the paper's migration strength, or ``auto``: the best of 0.1 … 0.9 at each place.
        linears: also fold from linear to linear (v to o, up to down), not only into norms.
    """

    alpha: float | Literal["auto"] = 0.5
    linears: bool = False

    @property
    def alphas(self) -> tuple[float, ...]:
        return _AUTO if self.alpha == "auto" else (self.alpha,)


@dataclass(slots=True)
class _Seen:
    largest: Tensor
    rows: list[Tensor]
    dropped: int = 0


class SmoothFinder:
    """Finds the factors of a pair; see :class:`llmquant.quantization.steps.channel_scaling.Finder`.

    Args:
        block: with its original weights.
        sets: linears to quantize that share an input, named from the block.
        inputs: the block's inputs.
        specs: the linears' grids, by full name.
        int8: linears whose input is rounded to int8, by full name.
        search: the recipe's scale search.
        options: see :class:`SmoothOptions`.
        all_experts: as for :func:`llmquant.quantization.blocks.capture.observe`.
    """

    method = "smooth"

    def __init__(
        self,
        block: nn.Module,
        sets: Sequence[tuple[str, ...]],
        inputs: Sequence[BlockInput],
        specs: Mapping[str, QuantSpec],
        int8: frozenset[str],
        search: ScaleSearch,
        options: SmoothOptions,
        all_experts: bool = False,
    ) -> None:
        self.linears = options.linears
        self._specs, self._int8, self._search, self._options = specs, int8, search, options
        self._seen = _observed(block, [s[0] for s in sets], inputs, all_experts)

    def unseen(self, pair: Pair) -> bool:
        seen = self._seen[pair.readers[0]]
        return not seen.rows and seen.dropped == 0

    def __call__(self, pair: Pair, names: Sequence[str], weights: Sequence[Tensor]) -> Scaled:
        """The factors that the pair's readers ``names`` (with ``weights``) want, or none.

        Raises:
            QuantizationError: no finite calibration token.
        """
        seen = self._seen[pair.readers[0]]
        if not seen.rows:
            raise QuantizationError(f"{names[0]} saw no finite calibration token")
        readers = [
            Reader(w, self._specs[n], n in self._int8) for n, w in zip(names, weights, strict=True)
        ]
        return search_smoothing(
            readers,
            torch.cat(seen.rows),
            seen.largest,
            self._options.alphas,
            self._search,
            pair.channel,
        )


def _observed(
    block: nn.Module, wanted: Sequence[str], inputs: Sequence[BlockInput], all_experts: bool
) -> dict[str, _Seen]:
    """Largest magnitudes over all finite tokens and an even sample of those, for each wanted
    linear."""
    linears = {n: m for n in wanted if isinstance(m := block.get_submodule(n), nn.Linear)}
    found: dict[str, _Seen] = {}
    share = max(1, _ROWS // len(inputs))
    for batch in inputs:
        for name, x in linear_inputs(block, linears, batch, {}, Watch(all_experts)).items():
            every = x.reshape(-1, x.shape[-1]).to(torch.float32)
            rows = every[torch.isfinite(every).all(dim=1)]
            seen = found.setdefault(name, _Seen(torch.zeros(rows.shape[1], device=rows.device), []))
            seen.dropped += every.shape[0] - rows.shape[0]
            if not rows.shape[0]:
                continue
            seen.largest = torch.maximum(seen.largest, rows.abs().amax(0))
            even = torch.linspace(
                0, rows.shape[0] - 1, min(share, rows.shape[0]), device=rows.device
            )
            seen.rows.append(rows[even.round().to(torch.int64)])
    return {name: found.get(name, _Seen(torch.zeros(0), [])) for name in wanted}
