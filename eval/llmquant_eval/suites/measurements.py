"""What a suite measures: a request per model and protocol, and the key of its result.

A result's key covers the weights and tokenizers of the model and its reference, the model's recipe,
the text, the protocol, how much of the text, dtype, device, kernel, versions and processor. Labels
and paths are not in the key. A server tells no weights, so its results have none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import llmquant
from llmquant_eval.report import machine
from llmquant_eval.run.request import Request
from llmquant_eval.suites.models import PreparedModel, digest
from llmquant_eval.suites.outdated import suite_dtype
from llmquant_eval.suites.schema import Suite, SuiteText, file_name


@dataclass(frozen=True, slots=True)
class Measurement:
    """One model under one protocol on one text, or (``text`` None) on the suite's tasks. ``key``
    None: never cached."""

    model: PreparedModel
    request: Request
    text: SuiteText | None
    protocol: str
    key: str | None

    @property
    def name(self) -> str:
        """File name of its report."""
        return file_name(self.model.label, self.text.name if self.text else None, self.protocol)


@dataclass(frozen=True, slots=True)
class Measurements:
    """All measurements of a suite whose models are there. ``texts``: sha256 of each by name."""

    suite: Suite
    cache: Path
    reference: PreparedModel | None
    models: Sequence[PreparedModel]
    texts: dict[str, str]

    def all(self) -> list[Measurement]:
        return [*self._of_texts(), *self._of_tasks()]

    def cost_key(self, model: PreparedModel) -> str:
        """The key of a model's speed and memory."""
        return digest(["cost", model.weights, *self._place()])

    def _of_texts(self) -> Iterator[Measurement]:
        suite = self.suite
        for text in suite.texts:
            for protocol in suite.protocols:
                for model in self.models:
                    request = Request(
                        (model.source,),
                        text.source,
                        protocol=protocol,
                        max_windows=text.max_windows,
                        noise_floor=False,
                        reference=None if self.reference is None else self.reference.source,
                        **self._common(),
                    )
                    if suite.cache_form is not None:
                        request = replace(
                            request,
                            cache=str(self.cache / "reference"),
                            cache_form=suite.cache_form,
                        )
                    key = self._key(
                        model,
                        self.reference,
                        [self.texts[text.name], protocol, text.max_windows, suite.cache_form],
                    )
                    yield Measurement(model, request, text, protocol, key)

    def _of_tasks(self) -> Iterator[Measurement]:
        tasks = self.suite.tasks
        if tasks is None:
            return
        everyone = self.models if self.reference is None else [self.reference, *self.models]
        for model in everyone:
            request = Request(
                (model.source,),
                tasks=",".join(tasks.names),
                include_path=tasks.include_path,
                limit=tasks.limit,
                tokenizer=self.reference.source
                if model.weights is None and self.reference is not None
                else None,
                **self._common(),
            )
            key = self._key(
                model,
                None,
                [*tasks.names, tasks.limit, _files_of(tasks.names, tasks.include_path), _lm_eval()],
            )
            yield Measurement(
                model, request, None, ", ".join(n.partition("=")[0] for n in tasks.names), key
            )

    def _common(self) -> dict[str, Any]:
        """Options of every request. Speed and memory are measured apart."""
        suite = self.suite
        return {
            "dtype": suite.dtype,
            "device": suite.device,
            "kernel": suite.kernel,
            "batch_size": suite.batch_size,
            "threads": suite.threads,
            "cost": False,
        }

    def _key(
        self, model: PreparedModel, reference: PreparedModel | None, measured: list[Any]
    ) -> str | None:
        if model.weights is None:
            return None
        base = None if reference is None else [reference.weights, reference.tokenizer]
        return digest(
            [model.weights, model.tokenizer, model.recipe, base, *measured, *self._place()]
        )

    def _place(self) -> list[Any]:
        suite = self.suite
        return [
            suite_dtype(suite),
            str(llmquant.parse_device(suite.device)),
            suite.kernel,
            suite.batch_size,
            machine.versions(),
            machine.processor(),
            llmquant.this_processor().instruction_sets,
            suite.threads,
        ]


def _files_of(names: Sequence[str], include_path: str | None) -> list[str]:
    """sha256 of the data and task files that the tasks' results depend on and that lie here."""
    paths = [Path(name.partition("=")[2]) for name in names if "=" in name]
    paths += sorted(Path(include_path).rglob("*.yaml")) if include_path is not None else []
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()]


def _lm_eval() -> str:
    try:
        return version("lm_eval")
    except PackageNotFoundError:
        return ""  # the run itself says how to install it
