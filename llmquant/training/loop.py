"""The training loop, on ``accelerate``: one device, several, or a CPU.

A step takes ``batch_size`` windows, ``micro_batch`` at a time; with several processes each takes
its share. The loss is the mean over the step's tokens that count, however they are spread. AdamW
moves float32 masters; products are in the accelerator's dtype.

At certain steps the held-out KL is measured with exactly the numbers that would be stored, and the
best state is kept; the start is one of them, so the result is never worse than it. A loss that is
NaN or infinite, or such a gradient, ends the run with what was best before.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from llmquant.errors import QuantizationError
from llmquant.models.experts import ExpertList
from llmquant.recipe_sections import QAT
from llmquant.runtime import signals as interruption
from llmquant.training.options import QatEvents, TrainingStep
from llmquant.training.schedule import measured_at, rate, windows_of
from llmquant.training.state.saved import Course, SavedTraining, moments, put_moments
from llmquant.training.student import Student
from llmquant.training.teacher.loss import divergence, hidden_error, next_token_loss
from llmquant.training.teacher.targets import TargetSource
from llmquant.training.teacher.text import TrainingText, Window

_BETAS = (0.9, 0.99)
_PATIENCE = timedelta(days=7)  # others wait while the first one asks the teacher and writes
Log = Callable[..., None]


def accelerator_for(device: torch.device, dtype: torch.dtype) -> Accelerator:
    """An accelerator for a device and the dtype of products; whatever an earlier run of this
    process set up is forgotten."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="bf16" if dtype == torch.bfloat16 else "no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
    )


@dataclass(slots=True)
class Training:
    """One run's loop.

    Attributes:
        student: what is trained.
        text: on what, and what is held out.
        targets: of held-out windows, then of those trained on.
        options: the recipe's section.
        seed: of the order of windows.
        accelerator: where and in which dtype.
        saved: the state on disk.
        log: called with an event's word and its facts.
    """

    student: Student
    text: TrainingText
    targets: TargetSource
    options: QAT
    seed: int
    accelerator: Accelerator
    saved: SavedTraining
    log: Log

    def run(self, events: QatEvents) -> tuple[Course, int]:
        """Train to the end; the student is left in its best state. Also tells how many steps an
        earlier process had taken.

        Raises:
            QuantizationError: the start's own logits are not finite.
        """
        optimizer = torch.optim.AdamW(self.student.groups(self.options), betas=_BETAS)
        names = self._names(optimizer)
        if any(isinstance(m, ExpertList) for m in self.student.model.modules()):
            # A step may route no token to an expert; and processes hold out unequal numbers of
            # windows, so they do not wait for each other to share buffers that never change.
            self.accelerator.ddp_handler = DistributedDataParallelKwargs(
                find_unused_parameters=True, broadcast_buffers=False
            )
        with warnings.catch_warnings():  # its newer name is not in every torch that is supported
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            model, optimizer = self.accelerator.prepare(self.student.model, optimizer)
        course, best = self._begin(optimizer, names, events)
        resumed, begun, tokens = course.step, time.monotonic(), 0
        measure_at = measured_at(self.options)
        while course.step < self.options.steps and course.stopped is None:
            loss, seen, problem = self._step(model, optimizer, course.step)
            if problem is not None:
                course.stopped = (
                    f"{problem}; the state of step {course.best_step} was kept. "
                    "A smaller learning rate may help"
                )
                break
            course.step += 1
            course.losses.append(loss)
            tokens += seen
            if course.step in measure_at:
                best = self._measured(model, course, best, events)
            speed = tokens / max(time.monotonic() - begun, 1e-9)
            self._tell(course, loss, speed, events)
            if course.measured == course.step or self.saved.due():
                self._save(course, optimizer, names, best)
            interruption.check()
        self.student.put(best)
        return course, resumed

    def _names(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """Names of the optimizer's parameters, in its order."""
        known = {id(p): name for name, p in self.student.parameters().items()}
        return [known[id(p)] for group in optimizer.param_groups for p in group["params"]]

    def _begin(
        self, optimizer: Any, names: list[str], events: QatEvents
    ) -> tuple[Course, dict[str, Tensor]]:
        """Where an earlier process got to, or the start with its held-out KL."""
        found = self.saved.load()
        if found is not None:
            course, parts = found
            self.student.put(parts["now"])
            put_moments(optimizer.optimizer, names, parts)
            best = {n: t.to(self.accelerator.device) for n, t in parts["best"].items()}
            if course.step:
                events.on_note(
                    f"resuming after step {course.step} of {self.options.steps} of an interrupted run"
                )
            return course, best
        kl = self.heldout(self.student.model, events)
        if not math.isfinite(kl):
            raise QuantizationError(
                f"before training the held-out KL is {kl}: the quantized model gives NaN or infinite logits; "
                "use --dtype float32, or quantize it anew"
            )
        course = Course(start=kl, best=kl, heldout=[(0, kl)], measured=0)
        self.log("heldout", step=0, kl=kl, best=kl)
        best = self.student.state()
        self._save(course, optimizer, names, best)
        return course, best

    def _save(
        self, course: Course, optimizer: Any, names: list[str], best: dict[str, Tensor]
    ) -> None:
        if not self.accelerator.is_main_process:
            return
        parts = {"now": self.student.state(), "best": best, **moments(optimizer.optimizer, names)}
        self.saved.save(course, parts)

    def _tell(self, course: Course, loss: float, speed: float, events: QatEvents) -> None:
        kl = course.heldout[-1][1]
        self.log(
            "step",
            step=course.step,
            loss=loss,
            lr=self.options.lr * rate(course.step - 1, self.options),
            tokens_per_second=round(speed, 1),
        )
        events.on_step(TrainingStep(course.step, self.options.steps, loss, kl, course.best, speed))

    def _measured(
        self, model: nn.Module, course: Course, best: dict[str, Tensor], events: QatEvents
    ) -> dict[str, Tensor]:
        """Measure the held-out KL; the best state, which may be this one."""
        kl = self.heldout(model, events)
        course.heldout.append((course.step, kl))
        course.measured = course.step
        if kl < course.best:
            course.best, course.best_step, course.waited = kl, course.step, 0
            best = self.student.state()
        else:
            course.waited += 1
        self.log("heldout", step=course.step, kl=kl, best=course.best)
        if course.waited >= self.options.patience and course.step < self.options.steps:
            more = {"scales": "", "codes": " and --codes-lr", "lora": " and --lora-lr"}
            course.stopped = (
                f"the held-out KL did not fall in {course.waited} measurements; "
                f"ended after step {course.step} of {self.options.steps}; smaller --lr{more[self.options.size]}, or "
                "more tokens a step (--batch-size), may come further"
            )
        return best

    def _step(self, model: nn.Module, optimizer: Any, step: int) -> tuple[float, int, str | None]:
        """One step: its loss, how many tokens it saw, and what was not finite, if anything was;
        then nothing moved."""
        count, size = len(self.text.training), self.options.batch_size
        chosen = windows_of(step, count, size, self.seed)
        total = sum(float(self.text.training[i].counts.sum()) for i in chosen)
        share = rate(step, self.options)
        rates = [g["lr"] for g in self.student.groups(self.options)]
        for group, full in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = full * share
        mine = chosen[self.accelerator.process_index :: self.accelerator.num_processes]
        optimizer.zero_grad()
        loss = torch.zeros((), device=self.accelerator.device)
        size = self.options.micro_batch
        parts = [mine[i : i + size] for i in range(0, len(mine), size)]
        for i, part in enumerate(parts):
            last = i + 1 == len(parts)
            with _together(self.accelerator, model, last):
                sum_ = self._loss(model, part) / total
                self.accelerator.backward(sum_ * self.accelerator.num_processes)
            loss += sum_.detach()
        value = float(self.accelerator.reduce(loss, "sum"))
        if not math.isfinite(value):
            return value, 0, f"the loss of step {step + 1} was {value:g}"
        parameters = list(self.student.parameters().values())
        norm = self.accelerator.clip_grad_norm_(parameters, self.options.clip)
        if norm is not None and not math.isfinite(float(norm)):
            return value, 0, f"the gradient of step {step + 1} was {float(norm):g}"
        optimizer.step()
        return value, sum(len(self.text.training[i].ids) for i in chosen), None

    def _loss(self, model: nn.Module, part: Sequence[int]) -> Tensor:
        """Summed over the tokens of some windows that count."""
        o, held = self.options, len(self.text.heldout)
        windows = [self.text.training[i] for i in part]
        logits, hidden = self._forward(model, windows, hidden=o.hidden_loss > 0)
        loss = torch.zeros((), device=logits.device)
        asked = self.targets.targets([held + i for i in part])
        for row, (targets, window) in enumerate(zip(asked, windows, strict=True)):
            each = divergence(targets, logits[row], o.temperature)
            if hidden is not None:
                each = each + o.hidden_loss * hidden_error(targets, hidden[row])
            if o.next_token_loss > 0:
                following = window.ids[1:].to(logits.device)
                each = each + o.next_token_loss * next_token_loss(logits[row], following)
            loss = loss + (each * window.counts.to(each.device)).sum()
        return loss

    def _forward(
        self, model: nn.Module, windows: Sequence[Window], *, hidden: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of all positions but the last, and last hidden states where they are wanted."""
        ids = torch.stack([w.ids for w in windows]).to(self.accelerator.device)
        out = model(ids, use_cache=False, output_hidden_states=hidden)
        states = out.hidden_states[-1][:, :-1] if hidden else None
        return out.logits[:, :-1], states

    @torch.no_grad()
    def heldout(self, model: nn.Module, events: QatEvents) -> float:
        """Mean KL over the held-out tokens that count."""
        total = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        count = len(self.text.heldout)
        mine = range(self.accelerator.process_index, count, self.accelerator.num_processes)
        size = self.options.micro_batch
        for part in (mine[i : i + size] for i in range(0, len(mine), size)):
            events.on_phase("held-out text", part[0], count)
            windows = [self.text.heldout[i] for i in part]
            logits, _ = self._forward(model, windows)
            for row, targets in enumerate(self.targets.targets(part)):
                kl = divergence(targets, logits[row]).to(torch.float64)
                counts = windows[row].counts.to(kl.device, torch.float64)
                total += torch.stack([(kl * counts).sum(), counts.sum()])
        summed: Tensor = self.accelerator.reduce(total, "sum")
        return float(summed[0] / summed[1])


def _together(accelerator: Accelerator, model: nn.Module, last: bool) -> Any:
    """Processes add their gradients up with the last part of a step only."""
    return torch.enable_grad() if last else accelerator.no_sync(model)
