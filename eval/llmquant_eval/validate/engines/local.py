"""A model folder, dense or packed, generating here.

Greedy unless a temperature is given; penalties and other settings of the folder's
``generation_config.json`` are left out, its end-of-turn tokens are not. Prompts of one unit are
generated together, padded on the left; where a model's positions depend on the longest of them
(:func:`llmquant.longrope_switch`), one after the other. A unit is what it is whatever ran before
it, so a resumed run ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

from llmquant.errors import QuantizationError, UsageError
from llmquant_eval.models.resolve import ModelFolder, max_positions
from llmquant_eval.texts.tokens import tokenizer_sha256
from llmquant_eval.validate.answers import Answer, Measured, Scored, Task, Unit
from llmquant_eval.validate.engines.engine import Generation, TaskError
from llmquant_eval.validate.engines.observing import Observer
from llmquant_eval.validate.engines.prompts import Prompts

if TYPE_CHECKING:
    from torch import Tensor

TOGETHER = 8
"""Prompts that are generated together: the weights are read once for all of them."""


class LocalEngine:
    """See :class:`llmquant_eval.validate.engines.engine.Engine`. Weights are read when the first
    unit is measured.

    Args:
        computing: dtype, device and kernel, by name.
        together: prompts that are generated together.
        observing: answers are observed for a drift profile.
    """

    scores = True

    def __init__(
        self,
        folder: ModelFolder,
        generation: Generation,
        computing: tuple[str, str, str],
        together: int,
        *,
        observing: bool = False,
    ) -> None:
        import llmquant

        self.label, self.together = folder.label, together
        self._path, self._generation = folder.path, generation
        dtype, device, self._kernel = computing
        # Before the tokenizer, which would take the blame.
        config = llmquant.read_config(folder.path)
        packed = getattr(config, "quantization_config", None) is not None
        self.original = not packed and not llmquant.is_onnx(folder.path)
        self._tokenizer: Any = llmquant.load_tokenizer(folder.path)
        self._prompts = Prompts(self._tokenizer, generation.raw, str(folder.path))
        self._device = llmquant.parse_device(device)
        self._dtype = llmquant.compute_dtype(folder.path, dtype, self._device).dtype
        self.thinks = self._prompts.thinks
        self.observes = llmquant.tokenizer_fingerprint(self._tokenizer) if observing else None

    def identity(self) -> Mapping[str, object]:
        import torch

        import llmquant

        observing = {"observing": 1} if self.observes is not None else {}
        return observing | {
            "weights": llmquant.inspect(self._path).weights_sha256,
            "tokenizer": tokenizer_sha256(self._tokenizer),
            "template": hashlib.sha256(str(self._tokenizer.chat_template).encode()).hexdigest(),
            "generation": asdict(self._generation),
            "ends": sorted(self._ends),
            "computing": [str(self._dtype), str(self._device), self._kernel],
            "threads": torch.get_num_threads(),
            "versions": [
                importlib.metadata.version(p) for p in ("llmquant", "torch", "transformers")
            ],
        }

    def computing(self) -> Mapping[str, str]:
        return {
            "dtype": str(self._dtype).removeprefix("torch."),
            "device": str(self._device),
            "kernel": self._kernel,
        }

    def check(self, tasks: Sequence[Task], where: Callable[[Task], str]) -> list[str]:
        longest = max_positions(self._path)
        for task in tasks:
            try:
                ids = self._prompts.ids(task)
                ends = [len(i) for _, i in self._prompts.pairs(task)]
            except UsageError as e:
                raise UsageError(f"{where(task)}: {e}") from e
            new = self._generation.max_tokens if task.generate else 0
            if longest is not None and max(len(ids) + new, *ends, 0) > longest:
                raise UsageError(
                    f"{where(task)}: a prompt of {len(ids):,} tokens and its answer ({new:,}) do not fit "
                    f"into the model's {longest:,} positions; shorten it, or lower --max-tokens"
                )
        return self._prompts.remarks(tasks)

    def same(self, unit: Unit, before: Sequence[Measured]) -> bool:
        return True  # its weights are part of the identity

    def measure(self, units: Sequence[Unit]) -> Iterator[tuple[int, list[Measured]]]:
        for place, unit in enumerate(units):
            answers = iter(self._generated([t for t in unit if t.generate]))
            yield (
                place,
                [
                    Measured(answer=next(answers) if t.generate else None, scored=self._scored(t))
                    for t in unit
                ],
            )

    @cached_property
    def _model(self) -> Any:
        import llmquant

        model: Any = llmquant.load(
            self._path, dtype=self._dtype, device=self._device, kernel=self._kernel
        )
        model.generation_config = llmquant.plain_generation(
            self._generation.max_tokens,
            self._generation.temperature,
            self._ends,
            self._tokenizer,
        )
        return model

    @cached_property
    def _ends(self) -> frozenset[int]:
        """Tokens that end a turn."""
        import llmquant

        given = llmquant.read_generation_config(self._path)
        return llmquant.end_tokens(llmquant.read_config(self._path), given, self._tokenizer)

    def _generated(self, tasks: Sequence[Task]) -> list[Answer]:
        """The answers of tasks that are generated together."""
        import torch

        import llmquant

        if not tasks:
            return []
        prompts = [self._prompts.ids(task) for task in tasks]
        length = max(map(len, prompts))
        if len(tasks) > 1 and self._apart(length + self._generation.max_tokens):
            return [answer for task in tasks for answer in self._generated([task])]
        ids = torch.zeros(len(tasks), length, dtype=torch.int64)  # masked where there is no prompt
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) :] = torch.tensor(prompt)
            mask[row, length - len(prompt) :] = 1
        drawn = json.dumps([self._generation.seed, [t.identity() for t in tasks]], sort_keys=True)
        torch.manual_seed(int.from_bytes(hashlib.sha256(drawn.encode()).digest()[:7]))
        model = self._model
        observer = None if self.observes is None else Observer()
        with torch.inference_mode():
            out = llmquant.generate_tokens(
                model,
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                logits_processor=[_Finite(tasks), *([observer] if observer else [])],
            )
        news = out[:, length:].tolist()
        answers = [
            self._answer(new, self._prompts.opens(task))
            for new, task in zip(news, tasks, strict=True)
        ]
        return answers if observer is None else observer.observed(prompts, news, answers)

    def _answer(self, new: list[int], opened: bool) -> Answer:
        end = next((i for i, token in enumerate(new) if token in self._ends), None)
        said = new if end is None else new[:end]
        text = self._decoded(said)
        marked = self._tokenizer.decode(said, skip_special_tokens=False)
        return Answer(
            text=text,
            marked=None if marked == text else marked,
            tokens=len(said) + (end is not None),
            ended=end is not None,
            opened=opened,
        )

    def _decoded(self, ids: Sequence[int]) -> str:
        """Without special tokens, but for those that thinking begins and ends with."""
        special = set(self._tokenizer.all_special_ids)
        marks = {self._tokenizer.convert_tokens_to_ids(m): m for m in ("<think>", "</think>")}
        pieces = groupby(ids, lambda token: marks.get(token) if token in special else None)
        return "".join(
            mark or self._tokenizer.decode(list(part), skip_special_tokens=True)
            for mark, part in pieces
        )

    def _scored(self, task: Task) -> tuple[Scored, ...]:
        """Each continuation after the prompt, one forward pass for all of a task."""
        if not task.continuations:
            return ()
        pairs = self._prompts.pairs(task)
        apart = self._apart(max(len(ids) for _, ids in pairs))
        passes = [[pair] for pair in pairs] if apart else [pairs]
        return tuple(scored for rows in passes for scored in self._scored_in_one(task, rows))

    def _scored_in_one(self, task: Task, pairs: Sequence[tuple[int, list[int]]]) -> list[Scored]:
        """One forward pass, padded on the right, where a causal model does not look."""
        import torch

        length, start = max(len(ids) for _, ids in pairs), min(n for n, _ in pairs)
        ids = torch.zeros(len(pairs), length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, (_, whole) in enumerate(pairs):
            ids[row, : len(whole)] = torch.tensor(whole)
            mask[row, : len(whole)] = 1
        log_p = self._log_p(task, ids, mask, length - start + 1)
        scored = []
        for row, (n, whole) in enumerate(pairs):
            at = torch.arange(n - 1, len(whole) - 1) - (start - 1)
            values = log_p[row, at].gather(1, torch.tensor(whole[n:])[:, None])
            scored.append(Scored(logprob=float(values.double().sum()), tokens=len(whole) - n))
        return scored

    def _apart(self, length: int) -> bool:
        """Whether a sequence of so many tokens would change the positions of others beside it."""
        import llmquant

        switch = llmquant.longrope_switch(self._model.config)
        return switch is not None and length > switch

    def _log_p(self, task: Task, ids: Tensor, mask: Tensor, last: int) -> Tensor:
        """float32 ``[rows, last, vocabulary]``: log-probabilities at the last positions."""
        import torch

        model = self._model
        some = "logits_to_keep" in inspect.signature(model.forward).parameters
        with torch.inference_mode():
            logits = model(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                **({"logits_to_keep": last} if some else {}),
            ).logits[:, -last:]
            if not bool(torch.isfinite(logits).all()):
                raise TaskError(task, _not_finite())
            log_p: Tensor = logits.float().log_softmax(-1).cpu()
        return log_p


def _not_finite() -> QuantizationError:
    return QuantizationError(
        "the model's output is NaN or infinite, so it has no answer; try --dtype float32"
    )


class _Finite:
    """Stops generation where logits are no numbers: the likeliest token of NaN is a token too."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = tasks

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        sound = logits.isfinite().all(dim=-1).tolist()
        if not all(sound):
            raise TaskError(self._tasks[sound.index(False)], _not_finite())
        return logits
