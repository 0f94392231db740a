"""Tasks through lm-eval: its prompts, its metrics, our models; every item's outcome kept.

A task is named as lm-eval names it, from its own collection or from ``--include-path``. The tasks
of this package's ``tasks`` folder read a JSON Lines file that is given with the name,
``arc_easy_local=FILE.jsonl``, and need no network.

Whether each item was right is kept in the Report as a string of ones and zeros, so that two models
can be compared item by item (:mod:`llmquant_eval.report.paired`); ``--log-samples`` writes all that
lm-eval logged, hashed, beside it.

Some tasks run the programs that a model writes (HumanEval, MBPP). They are refused, also where
``HF_ALLOW_CODE_EVAL`` would allow them: a model under test must not run code on this machine.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
import os
import re
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from llmquant import replace_file
from llmquant.errors import LlmquantError, UsageError
from llmquant_eval.report.results import SampleFile, TaskMetric, TaskResult
from llmquant_eval.tasks.local_data import local_rows

LOCAL_TASKS = Path(__file__).parent / "local"
_ALLOW_PROGRAMS = "HF_ALLOW_CODE_EVAL"


@dataclass(frozen=True, slots=True)
class TaskPlan:
    """Tasks that exist. ``configs`` are lm-eval names or whole configurations; ``manager`` is
    lm-eval's TaskManager."""

    configs: tuple[str | dict[str, Any], ...]
    manager: Any
    limit: int | None
    samples: Path | None


def plan_tasks(
    names: Sequence[str], include_path: str | None, limit: int | None, samples: str | None
) -> TaskPlan:
    """Find every task before a weight is read.

    Raises:
        UsageError: lm-eval is not installed, a task, file or folder that does not exist, a row of
            a file that its task cannot use, a task that runs generated programs, a limit below 1.
        LlmquantError: a task does not fit its data.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} leaves no item; give 1 or more")
    if include_path is not None and not Path(include_path).is_dir():
        raise UsageError(
            f"--include-path {include_path} is not a folder; give the one that holds your task files"
        )
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise UsageError(
            f"tasks run through lm-eval, which is not installed ({e}); pip install 'llmquant[eval]'"
        ) from e
    configs = tuple(
        _local_task(name) if "=" in name or _local_file(name).is_file() else name for name in names
    )
    plain = [c for c in configs if isinstance(c, str)]
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if any(name not in manager.all_tasks for name in plain):
        manager = TaskManager(include_path=include_path)  # seconds: it reads thousands of files
    missing = [name for name in plain if name not in manager.all_tasks]
    if missing:
        local = ", ".join(sorted(p.stem for p in LOCAL_TASKS.glob("*.yaml")))
        raise UsageError(
            f"--tasks {missing[0]}: no such task in lm-eval {_version()}"
            f"{f' or {include_path}' if include_path else ''}; `lm_eval ls tasks` lists its tasks, and {local} "
            "read a file of yours (NAME=FILE.jsonl)"
        )
    logging.getLogger("lm_eval").setLevel(
        logging.ERROR
    )  # it warns of a loaded model, which is what we always give it
    with _lm_eval_errors(configs):
        loaded = manager.load(list(configs))  # reads the data, fills in the first item's templates
    unsafe = [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe:
        raise UsageError(_runs_programs(unsafe[0]))
    return TaskPlan(configs, manager, limit, None if samples is None else Path(samples))


@contextmanager
def _lm_eval_errors(configs: Sequence[str | dict[str, Any]]) -> Iterator[None]:
    """Turns what lm-eval raises on a task's templates and data into an error of ours; it has no
    exceptions of its own."""
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError

    try:
        with warnings.catch_warnings(action="ignore"), _without_output(), _without_programs():
            yield
    except (
        AssertionError,
        ValueError,
        LookupError,
        TypeError,
        OSError,
        ImportError,
        DatasetsError,
        TemplateError,
    ) as e:
        names = ", ".join(c if isinstance(c, str) else str(c["task"]) for c in configs)
        if _ALLOW_PROGRAMS in str(e):
            raise UsageError(_runs_programs(names)) from e
        raise LlmquantError(
            f"lm-eval cannot run {names}: {type(e).__name__}: {str(e).strip()}"
        ) from e


def _runs_programs(task: str) -> str:
    return (
        f"--tasks {task} runs the programs that a model writes, which llmquant never does; "
        "run it with lm_eval itself, in a container"
    )


@contextmanager
def _without_programs() -> Iterator[None]:
    """The metric ``code_eval`` runs what a model wrote where this variable says so."""
    before = os.environ.get(_ALLOW_PROGRAMS)
    os.environ[_ALLOW_PROGRAMS] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ALLOW_PROGRAMS]
        else:
            os.environ[_ALLOW_PROGRAMS] = before


@contextmanager
def _without_output() -> Iterator[None]:
    """lm-eval draws bars on stderr without a switch, across ours and in spite of --quiet; so do the
    data sets. And it asks git for a commit, which says ``fatal`` outside a repository."""
    import datasets
    from lm_eval import evaluator
    from lm_eval.api import task

    datasets.disable_progress_bars()
    bar, commit = getattr(task, "tqdm", None), getattr(evaluator, "get_git_commit_hash", None)
    task.tqdm = lambda items, **_: items
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        task.tqdm, evaluator.get_git_commit_hash = bar, commit


def _local_file(name: str) -> Path:
    return LOCAL_TASKS / f"{name}.yaml"


def _local_task(text: str) -> dict[str, Any]:
    """``NAME=FILE.jsonl`` → lm-eval's configuration of it."""
    name, _, file = text.partition("=")
    if not _local_file(name).is_file():
        local = ", ".join(sorted(p.stem for p in LOCAL_TASKS.glob("*.yaml")))
        raise UsageError(
            f"--tasks {text}: only the tasks {local} read a file of yours; leave out ={file}"
        )
    if not file:
        raise UsageError(f"--tasks {text} reads a file of yours; write {name}=FILE.jsonl")
    if not Path(file).is_file():
        raise UsageError(f"--tasks {text}: {file} is not a file; give a JSON Lines file")
    rows = local_rows(name, Path(file))
    config: dict[str, Any] = yaml.safe_load(_local_file(name).read_text(encoding="utf-8"))
    return config | {"custom_dataset": partial(_dataset, rows)}


def _dataset(rows: list[dict[str, Any]], **_: Any) -> Any:
    """What lm-eval reads of a file of the user's; it passes a task's metadata too."""
    from datasets import Dataset, DatasetDict

    return DatasetDict({"test": Dataset.from_list(rows)})


def run_tasks(plan: TaskPlan, model: Any, label: str) -> list[TaskResult]:
    """Run every task on one of lm-eval's models.

    Raises:
        LlmquantError: a task cannot be run on its data.
    """
    from lm_eval import simple_evaluate

    with _lm_eval_errors(plan.configs):
        results = simple_evaluate(
            model=model,
            tasks=list(plan.configs),
            task_manager=plan.manager,
            limit=plan.limit,
            log_samples=True,
            bootstrap_iters=0,
        )
    assert results is not None  # only ranks other than 0 get none
    return [_result(name, results, plan, label) for name in results["samples"]]


def _result(task: str, results: Mapping[str, Any], plan: TaskPlan, label: str) -> TaskResult:
    samples = sorted(results["samples"][task], key=lambda s: (s["filter"], s["doc_id"]))
    first_filter = [s for s in samples if s["filter"] == samples[0]["filter"]]
    identity = "\n".join(f"{s['doc_hash']} {s['target_hash']}" for s in first_filter)
    version = results["versions"].get(task)
    return TaskResult(
        task=task,
        version=None if version is None else str(version),
        lm_eval=_version(),
        few_shot=int(results["n-shot"].get(task, 0)),
        items=len(first_filter),
        items_available=int(results["n-samples"][task]["original"]),
        items_sha256=hashlib.sha256(identity.encode()).hexdigest(),
        metrics=dict(_metrics(results["results"][task], samples)),
        samples=None
        if plan.samples is None
        else _write_samples(plan.samples, label, task, samples),
    )


def _metrics(
    results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> list[tuple[str, TaskMetric]]:
    """lm-eval's ``metric,filter`` keys → metrics; the filter is named only where there is one."""
    metrics = []
    for key, value in results.items():
        name, comma, chosen = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        each = [s.get(name) for s in samples if s["filter"] == chosen]
        right = (
            "".join(str(int(v)) for v in each if v in (0, 1))
            if all(v in (0, 1) for v in each)
            else None
        )
        metric = TaskMetric(
            value=float(value), standard_error=_standard_error(float(value), each), correct=right
        )
        metrics.append((name if chosen == "none" else key, metric))
    return metrics


def _standard_error(value: float, each: Sequence[Any]) -> float | None:
    """Of a mean over items, or of the perplexity of log-likelihoods (delta method); None for
    another aggregate.

    Which it is, the numbers tell. lm-eval's own bootstrap prints to stdout and forks a process per
    core.
    """
    if len(each) < 2 or not all(isinstance(v, (int, float)) for v in each):
        return None
    mean = statistics.fmean(each)
    error = float(statistics.stdev(each)) / math.sqrt(len(each))
    if math.isclose(value, mean, rel_tol=1e-9, abs_tol=1e-12):
        return error
    return value * error if math.isclose(value, math.exp(-mean), rel_tol=1e-9) else None


def _write_samples(
    folder: Path, label: str, task: str, samples: Sequence[Mapping[str, Any]]
) -> SampleFile:
    path = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', label).strip('-')}.{task}.jsonl"
    text = "".join(
        json.dumps(s, ensure_ascii=False, default=str, sort_keys=True) + "\n" for s in samples
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, text)
    except OSError as e:
        raise LlmquantError(f"--log-samples {folder}: {path.name} cannot be written: {e}") from e
    return SampleFile(path=str(path), sha256=hashlib.sha256(text.encode()).hexdigest())


def _version() -> str:
    return importlib.metadata.version("lm_eval")
