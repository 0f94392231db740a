"""A decoding step of all rows whose shapes and addresses never change, so that a GPU can record it
once and repeat it.

A step of one token is some hundred small kernels, and Python takes longer to launch them than the
GPU to run them. A CUDA graph is launched at once, but it repeats the very kernels on the very
memory. So what differs from step to step stands in one tensor that is written to before each: ids,
positions, each row's first column, and the column of the new token. The cache gives all its
columns, and a mask says which of them count. There is a graph for every number of rows; when the
cache's buffers move, all are recorded anew.

It is the arithmetic of :class:`~llmquant_serve.engines.batcher.Batcher`'s own step, which stays for
every other device, but that attention also sums over columns whose weight is zero.

Recordings are trusted after a trial on the device and model at hand. Where it fails, or a recording
does later, steps are run anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmquant_serve.engines.row_cache import RowCache

_LOG = logging.getLogger(__name__)
# Of the largest logit. The kernels are the same, so only sums whose order is not fixed may differ.
_SAME = 0.02

Replay = Callable[[], Tensor]
Recorder = Callable[[Callable[[], Tensor]], Replay]
"""Runs something once and returns what repeats it, on the same memory."""


def cuda_graph(run: Callable[[], Tensor]) -> Replay:
    """A recorder for NVIDIA and AMD GPUs."""
    beside, current = torch.cuda.Stream(), torch.cuda.current_stream()
    beside.wait_stream(current)
    with torch.cuda.stream(beside):
        run()  # what libraries do at their first call cannot be recorded
    current.wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # two engines may share a GPU
        result = run()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def recorder_for(model: PreTrainedModel) -> Recorder | None:
    """What can record the model's steps; None where nothing can, or a trial failed."""
    if model.device.type != "cuda":
        return None
    reason = why_not(model)
    if reason is not None:
        _LOG.info("steps are not recorded as CUDA graphs: %s", reason)
        return None
    reason = trial(model, cuda_graph)
    if reason is not None:
        given_up(reason)
        return None
    return cuda_graph


def given_up(reason: str) -> None:
    _LOG.warning("steps are run anew, not repeated as CUDA graphs: %s", reason)


def why_not(model: PreTrainedModel) -> str | None:
    """The reason why one mask for all blocks, as numbers that are true or false, would be wrong."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        return "blocks look at parts of the context"
    if config._attn_implementation != "sdpa":
        return f"attention is {config._attn_implementation}, not sdpa"
    return None


@dataclass(slots=True)
class StaticStep:
    """One step of ``rows`` sequences; see the module text.

    Attributes:
        numbers: int64 ``[3 * rows + 1]``: ids, positions, first columns, the new column.
    """

    model: Any
    cache: RowCache
    rows: int
    numbers: Tensor

    def run(self) -> Tensor:
        """Float32 logits ``[rows, vocab]``; waits for nothing."""
        ids, positions, first = self.numbers[:-1].view(3, self.rows, 1)
        window, column = self.cache.window, self.numbers[-1:]
        columns = torch.arange(window.columns, device=self.numbers.device)
        mask = (columns >= first) & (columns <= column)
        window.column = column
        try:
            out = self.model(
                input_ids=ids, attention_mask=mask[:, None, None], position_ids=positions,
                past_key_values=self.cache, use_cache=True,
            )  # fmt: skip
        finally:
            window.column = None
        logits: Tensor = out.logits[:, -1].float()
        return logits


class StepGraphs:
    """Recorded steps of a model over a cache, by their number of rows.

    Args:
        record: the recorder.

    Attributes:
        failed: why nothing is recorded any more, once that is so.
    """

    def __init__(self, model: PreTrainedModel, cache: RowCache, record: Recorder) -> None:
        self._model, self._cache, self._record = model, cache, record
        self._recorded: dict[int, tuple[StaticStep, Replay]] = {}
        self._moves = cache.window.moves
        self.failed: str | None = None

    def step(self, last: Sequence[int]) -> Tensor:
        """Float32 logits ``[rows, vocab]`` after the newest token of every row; they are
        overwritten by the next step of as many rows."""
        window = self._cache.window
        if self._moves != window.moves:
            self._recorded.clear()
            self._moves = window.moves
        rows = len(last)
        numbers = [*last, *window.lengths, *(window.end - n for n in window.lengths), window.end]
        now = torch.tensor(numbers, dtype=torch.int64)
        if rows not in self._recorded:
            step = StaticStep(self._model, self._cache, rows, now.to(self._model.device))
            try:
                self._recorded[rows] = step, self._record(step.run)
            except RuntimeError as e:  # what torch raises for all that a capture does not permit
                self.failed = str(e).splitlines()[0]
                self._recorded.clear()
                return step.run()
        step, replay = self._recorded[rows]
        step.numbers.copy_(now, non_blocking=True)
        return replay()


def trial(model: PreTrainedModel, record: Recorder) -> str | None:
    """Why recorded steps cannot be trusted, or None: steps of two short sequences, of which one is
    replaced and one leaves, beside the same steps run anew."""
    try:
        anew = _trial_steps(model, lambda run: run)
        repeated = _trial_steps(model, record)
    except RuntimeError as e:
        return str(e).splitlines()[0]
    off = float((repeated - anew).abs().max() / anew.abs().max())
    if off <= _SAME:
        return None
    return f"repeated, a step's logits were off by {off:.2g} of the largest"


@torch.inference_mode()
def _trial_steps(model: Any, record: Recorder) -> Tensor:
    """Logits ``[steps of all rows, vocab]``."""
    cache = RowCache(model.config.get_text_config().num_hidden_layers, 2)
    graphs, found = StepGraphs(model, cache, record), []
    for joins, leaves, steps in (((4, 2), False, 2), ((6,), True, 1), ((), True, 2)):
        if leaves:
            cache.leave(0)
        for length in joins:
            prompt = torch.arange(length, device=model.device)[None]
            cache.join(model(input_ids=prompt, use_cache=True).past_key_values, length)
        for _ in range(steps):
            cache.before_step()
            found.append(graphs.step(list(range(len(cache.lengths)))).clone())
            cache.after_step()
            if graphs.failed:
                raise RuntimeError(graphs.failed)
    return torch.cat(found)
