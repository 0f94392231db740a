"""A decoding step of all rows whose shapes and addresses never change, so that a GPU can record it
once and repeat it.

A step of one token is some hundred small kernels, and Python takes longer to launch them than the
GPU to run them. A CUDA graph is launched at once, but it repeats the very kernels on the very
memory. So what differs from step to step stands in one tensor that is written to before each: ids,
positions, each row's first column, and the column of the new token. The cache gives more columns
than are in use, and a mask says which of them count. There is a graph for every number of rows and
of columns given (1, 1.5, 2, 3, 4 … times 256); when the cache's buffers become others, all are
recorded anew.

It is the arithmetic of :class:`~llmquant_serve.engines.batching.batcher.Batcher`'s own step, which
stays for every other device, but that attention also sums over columns whose weight is zero.

Recordings are trusted after a trial on the device and model at hand. Where it fails, or a recording
does later, steps are run anew.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmquant_serve.engines.batching.row_cache import RowCache, column_step

_LOG = logging.getLogger(__name__)
# Of the largest logit. The kernels are the same, so only sums whose order is not fixed may differ.
_SAME = 0.02
_ONE_AT_A_TIME = threading.Lock()  # CUDA permits one recording at a time, of all engines

Replay = Callable[[], Tensor]
Recorder = Callable[[Callable[[], Tensor]], Replay]
"""Runs something once and returns what repeats it, on the same memory."""


class CudaGraphs:
    """Records for NVIDIA and AMD GPUs: one stream and one pool of memory for all recordings, whose
    results are read before the next one is repeated.

    The first time, what waits for the device is found before it is recorded, since a recording that
    fails leaves torch in a bad state. Nothing else may use a GPU of this process then.

    Args:
        device: the thread's current one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = torch.cuda.current_device() if device.index is None else device.index
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._last: Any = None  # torch refuses a pool whose graphs are all gone
        self._beside = torch.cuda.Stream(self._device)
        self._checked = False

    def __call__(self, run: Callable[[], Tensor]) -> Replay:
        """Raises RuntimeError for what cannot be recorded."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        with _ONE_AT_A_TIME, _no_collection():
            self._beside.wait_stream(current)
            with torch.cuda.stream(self._beside):
                run()  # what libraries do at their first call cannot be recorded
                if not self._checked:
                    _check_waits(run)
                    self._checked = True
                torch.cuda.synchronize(self._device)
                with ExitStack() as failed:
                    failed.callback(self._abandon, graph)
                    graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                    result = run()
                    graph.capture_end()
                    failed.pop_all()
                self._last = graph
            current.wait_stream(self._beside)

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    def _abandon(self, graph: Any) -> None:
        """End a recording that failed. torch raises at its end too, and then its allocator and its
        random numbers would go on to think that one is under way."""
        try:
            graph.capture_end()
        except RuntimeError:
            with suppress(RuntimeError):  # it had not begun
                torch._C._cuda_endAllocateToPool(self._device, self._pool)
            random = torch.cuda.default_generators[self._device]
            random.graphsafe_set_state(random.clone_state())
        if self._last is None:
            self._pool = torch.cuda.graph_pool_handle()


def _check_waits(run: Callable[[], Tensor]) -> None:
    """Raises RuntimeError if it waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as e:
        raise RuntimeError(f"a step waits for the device: {e}") from e
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def _no_collection() -> Iterator[None]:
    """Freed objects may do to the device what a recording does not permit."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def recorder_for(model: PreTrainedModel) -> Recorder | None:
    """What can record the model's steps; None where nothing can, or a trial failed."""
    if model.device.type != "cuda":
        return None
    reason = why_not(model)
    if reason is not None:
        _LOG.info("steps are not recorded as CUDA graphs: %s", reason)
        return None
    record = CudaGraphs(model.device)
    reason = trial(model, record)
    if reason is not None:
        given_up(reason)
        return None
    return record


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
        columns: of the cache that attention reads; a mask says which of them count.
        numbers: int64 ``[3 * rows + 1]``: ids, positions, first columns, the new column.
    """

    model: Any
    cache: RowCache
    rows: int
    columns: int
    numbers: Tensor

    def run(self) -> Tensor:
        """Float32 logits ``[rows, vocab]``; waits for nothing."""
        ids, positions, first = self.numbers[:-1].view(3, self.rows, 1)
        window, column = self.cache.window, self.numbers[-1:]
        columns = torch.arange(self.columns, device=self.numbers.device)
        mask = (columns >= first) & (columns <= column)
        window.column, window.read = column, self.columns
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
    """Recorded steps of a model over a cache, by their numbers of rows and columns.

    Args:
        record: the recorder.

    Attributes:
        failed: why nothing is recorded any more, once that is so.
    """

    def __init__(self, model: PreTrainedModel, cache: RowCache, record: Recorder) -> None:
        self._model, self._cache, self._record = model, cache, record
        self._recorded: dict[tuple[int, int], tuple[StaticStep, Replay]] = {}
        self._moves = cache.window.moves
        self.failed: str | None = None

    def step(self, last: Sequence[int]) -> Tensor:
        """Float32 logits ``[rows, vocab]`` after the newest token of every row; they are
        overwritten by the next step."""
        window = self._cache.window
        if self._moves != window.moves:
            self._recorded.clear()
            self._moves = window.moves
        rows = len(last)
        numbers = [*last, *window.lengths, *(window.end - n for n in window.lengths), window.end]
        now = torch.tensor(numbers, dtype=torch.int64)
        size = rows, min(column_step(window.end + 1), window.columns)
        if size not in self._recorded:
            step = StaticStep(self._model, self._cache, *size, now.to(self._model.device))
            try:
                self._recorded[size] = step, self._record(step.run)
            except RuntimeError as e:  # what torch raises for all that a capture does not permit
                self.failed = str(e).splitlines()[0]
                self._recorded.clear()
                return step.run()
        step, replay = self._recorded[size]
        step.numbers.copy_(now, non_blocking=True)
        return replay()


def trial(model: PreTrainedModel, record: Recorder) -> str | None:
    """Why recorded steps cannot be trusted, or None: six steps of a short sequence that another one
    joins, that is replaced, and that leaves, beside the same steps run anew."""
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
    for joins, leaves, steps in (
        ((4,), False, 1),
        ((2,), False, 2),
        ((6,), True, 1),
        ((), True, 2),
    ):
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
