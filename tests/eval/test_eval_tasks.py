"""Tasks through lm-eval: over loaded models and local files, item by item, paired with the
reference."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats as scipy_stats

from llmquant.errors import LlmquantError, SourceError, UsageError
from llmquant_eval.report.paired import mcnemar, paired_metric, with_pairs
from llmquant_eval.report.results import TaskMetric, TaskResult
from llmquant_eval.report.schema import Report
from llmquant_eval.report.table import side_tables
from llmquant_eval.run.evaluate import evaluate
from llmquant_eval.run.request import Request
from llmquant_eval.tasks.local_data import local_rows

pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's and datasets' own
DATA = Path(__file__).parent / "data"
ARC = f"arc_easy_local={DATA / 'arc.jsonl'}"


@pytest.fixture(scope="module")
def coarse(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-llama with its projections rounded hard enough to answer some items otherwise."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("models") / "coarse"
    shutil.copytree(tiny_llama, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {k: (v * 6).round() / 6 if "proj" in k else v for k, v in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def plain_choice(folder: Path, prompt: str, choices: list[str]) -> tuple[int, int]:
    """Best choice by log-likelihood and by log-likelihood per byte; by hand, one forward per
    choice."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    totals = []
    for choice in choices:
        before, whole = (tokenizer(t)["input_ids"] for t in (prompt, f"{prompt} {choice}"))
        with torch.no_grad():
            log_p = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        totals.append(sum(float(log_p[t - 1, whole[t]]) for t in range(len(before), len(whole))))
    by_byte = [total / len(choice) for total, choice in zip(totals, choices, strict=True)]
    return totals.index(max(totals)), by_byte.index(max(by_byte))


@pytest.fixture(scope="module")
def report(tiny_llama: Path, coarse: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    files = {n: DATA / f"{n.removesuffix('_local').removesuffix('_easy')}.jsonl" for n in
             ("arc_easy_local", "piqa_local", "lambada_local", "choice_local")}  # fmt: skip
    request = Request(
        (str(coarse),), reference=str(tiny_llama), dtype="float32", cost=False,
        tasks=",".join(f"{name}={file}" for name, file in files.items()),
        log_samples=str(tmp_path_factory.mktemp("out") / "samples"),
    )  # fmt: skip
    return evaluate(request)


def test_every_item_is_answered_as_by_hand(report: Report, tiny_llama: Path) -> None:
    items = [
        json.loads(line) for line in (DATA / "arc.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    picks = [
        plain_choice(tiny_llama, f"Question: {i['question']}\nAnswer:", i["choices"]["text"])
        for i in items
    ]
    answers = ["ABCD".index(item["answerKey"]) for item in items]
    result = report.models[0].tasks[0]
    assert (result.task, result.items, result.items_available, result.few_shot) == (
        "arc_easy_local",
        12,
        12,
        0,
    )
    for name, column in (("acc", 0), ("acc_norm", 1)):
        right = [pick[column] == answer for pick, answer in zip(picks, answers, strict=True)]
        assert result.metrics[name].correct == "".join(str(int(r)) for r in right)
        assert result.metrics[name].value == pytest.approx(sum(right) / 12)


def test_all_tasks_have_results_for_both_models(report: Report) -> None:
    names = ["arc_easy_local", "piqa_local", "lambada_local", "choice_local"]
    assert [t.task for m in report.models for t in m.tasks] == names * 2
    assert report.protocols == [f"task/{name}" for name in names]
    assert (report.text, report.passes) == (None, [])
    lambada = report.models[1].tasks[2]
    assert set(lambada.metrics) == {"perplexity", "acc"}
    assert lambada.metrics["perplexity"].correct is None
    assert lambada.metrics["perplexity"].value > 1
    assert Report.from_json(report.to_json()) == report


@pytest.mark.parametrize(
    ("task", "name"), [(0, "acc"), (2, "perplexity")], ids=["a mean", "a perplexity"]
)
def test_errors_are_those_of_the_items(task: int, name: str, report: Report) -> None:
    result = report.models[0].tasks[task]
    assert result.samples is not None
    values = [
        json.loads(line)[name]
        for line in Path(result.samples.path).read_text(encoding="utf-8").splitlines()
    ]
    error = float(scipy_stats.sem(values))
    expected = error if name == "acc" else math.exp(-sum(values) / len(values)) * error
    assert result.metrics[name].standard_error == pytest.approx(expected, rel=1e-9)


def test_the_candidate_is_paired_with_the_reference(report: Report) -> None:
    reference, candidate = (m.tasks[0] for m in report.models)
    assert reference.paired == {}
    assert set(candidate.paired) == {"acc", "acc_norm"}
    pair = candidate.paired["acc"]
    assert pair.lost + pair.gained + pair.both_right + pair.both_wrong == 12
    assert pair.lost + pair.gained > 0  # the model was spoiled enough to flip something
    assert pair.difference == pytest.approx(
        candidate.metrics["acc"].value - reference.metrics["acc"].value
    )


def test_logged_samples_are_hashed_and_complete(report: Report) -> None:
    for model in report.models:
        for task in model.tasks:
            assert task.samples is not None
            data = Path(task.samples.path).read_bytes()
            assert hashlib.sha256(data).hexdigest() == task.samples.sha256
            lines = [json.loads(line) for line in data.decode().splitlines()]
            assert len(lines) == task.items
            name = next(n for n, m in task.metrics.items() if m.correct is not None)
            assert "".join(str(int(line[name])) for line in lines) == task.metrics[name].correct


def test_tasks_have_tables_of_their_own(report: Report) -> None:
    shown = side_tables(report)
    assert [g.title.split(",")[0] for g in shown] == report.protocols
    assert shown[0].headers == ("acc", "acc_norm", "acc flips", "acc_norm flips")
    assert [row[0] for row in shown[0].rows] == ["tiny-llama", "coarse"]
    pair = report.models[1].tasks[0].paired["acc"]
    assert shown[0].rows[1][3].startswith(f"-{pair.lost} +{pair.gained}, p=")


def test_a_packed_model_runs_tasks_as_loaded(base_model: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    shutil.copytree(base_model.parent / "llmcompressor-w4-sym", packed)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base_model / name, packed / name)
    data = tmp_path / "c.jsonl"
    data.write_text(
        '{"question": "w3 w4", "choices": [" w5", " w6 w7"], "answer": 0}\n' * 3, encoding="utf-8"
    )
    result = evaluate(
        Request((str(packed),), tasks=f"choice_local={data}", limit=2, cost=False)
    ).models[0]
    assert sum(result.kernels.values()) == result.quantized_linears > 0
    assert (result.tasks[0].items, result.tasks[0].items_available) == (2, 3)


def test_a_task_file_of_one_s_own(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: '{DATA / 'piqa.jsonl'}'}}}}\n"
        "doc_to_text: '{{goal}}'\ndoc_to_target: label\ndoc_to_choice: '{{[sol1, sol2]}}'\n",
        encoding="utf-8",
    )
    request = Request(
        (str(tiny_llama),), tasks="mine", include_path=str(tmp_path), limit=3, cost=False
    )
    (task,) = evaluate(request).models[0].tasks
    assert (task.task, task.items, task.samples) == ("mine", 3, None)


def test_nothing_is_drawn_across_our_own_progress(
    tiny_llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        evaluate(
            Request(
                (str(tiny_llama),),
                tasks=f"{ARC},lambada_local={DATA / 'lambada.jsonl'}",
                limit=2,
                cost=False,
            )
        )
    finally:
        transformers_logging.enable_progress_bar()
    assert tuple(capfd.readouterr()) == ("", "")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        pytest.param({"tasks": ARC, "limit": 0}, UsageError, "--limit 0", id="no items"),
        pytest.param(
            {"tasks": "arc_easy_local"},
            UsageError,
            r"write arc_easy_local=FILE\.jsonl",
            id="no file named",
        ),
        pytest.param(
            {"tasks": "arc_easy_local=no/such"},
            UsageError,
            "no/such is not a file",
            id="no such file",
        ),
        pytest.param(
            {"tasks": f"hellaswag={DATA}"},
            UsageError,
            "only the tasks arc_easy_local",
            id="not ours",
        ),
        pytest.param(
            {"tasks": ARC, "include_path": "no/such"}, UsageError, "--include-path", id="no folder"
        ),
        pytest.param(
            {"limit": 3, "text": "file:t"},
            UsageError,
            "belong to --tasks",
            id="limit without tasks",
        ),
        pytest.param({}, UsageError, "nothing to measure", id="nothing"),
        pytest.param(
            {"tasks": ARC, "protocol": "ppl/word"},
            UsageError,
            "needs a text",
            id="protocol without text",
        ),
        pytest.param(
            {"tasks": f"piqa_local={DATA / 'arc.jsonl'}"},
            UsageError,
            "arc.jsonl, line 1: goal is no text; piqa_local cannot use it",
            id="other fields",
        ),
    ],
)
def test_misuse(
    options: dict[str, Any], error: type[LlmquantError], message: str, tiny_llama: Path
) -> None:
    with pytest.raises(error, match=message):
        evaluate(Request((str(tiny_llama),), cost=False, **options))


_ARC_ROW = {
    "question": "q",
    "choices": {"text": ["a", "b"], "label": ["1", "2"]},
    "answerKey": "2",
}
_PIQA_ROW = {"goal": "g", "sol1": "a", "sol2": "b", "label": 1}
_CHOICE_ROW = {"question": "q", "choices": ["a", "b"], "answer": 1}


@pytest.mark.parametrize(
    ("task", "row", "says"),
    [
        ("arc_easy_local", _ARC_ROW | {"question": None}, "question is no text"),
        ("arc_easy_local", _ARC_ROW | {"choices": ["a", "b"]}, "choices is no object"),
        ("arc_easy_local", _ARC_ROW | {"answerKey": "C"}, "answerKey is not one of the labels"),
        (
            "arc_easy_local",
            _ARC_ROW | {"choices": {"text": ["a", "b", "c"], "label": ["1", "2"]}},
            "not one label for each text",
        ),
        ("piqa_local", _PIQA_ROW | {"sol2": ""}, "sol2 is no text"),
        ("piqa_local", _PIQA_ROW | {"label": -1}, "label is not the place"),
        ("piqa_local", _PIQA_ROW | {"label": "1"}, "label is not the place"),
        ("lambada_local", {"text": "the last word "}, "text ends in white space"),
        ("lambada_local", {"text": "word"}, "text is one word"),
        ("choice_local", _CHOICE_ROW | {"answer": "b"}, "an integer from 0 to 1"),
        ("choice_local", _CHOICE_ROW | {"answer": 2}, "an integer from 0 to 1"),
        ("choice_local", _CHOICE_ROW | {"answer": True}, "an integer from 0 to 1"),
        ("choice_local", _CHOICE_ROW | {"choices": ["a"]}, "no list of two texts or more"),
        ("choice_local", _CHOICE_ROW | {"choices": ["a", ""]}, "no list of two texts or more"),
    ],
)  # fmt: skip
def test_a_row_that_no_model_could_get_right_is_refused(
    task: str, row: dict[str, Any], says: str, tmp_path: Path
) -> None:
    good = {"arc": _ARC_ROW, "piqa": _PIQA_ROW, "choice": _CHOICE_ROW, "lambada": {"text": "a b"}}
    file = tmp_path / "mine.jsonl"
    lines = [json.dumps(good[task.partition("_")[0]]), "", json.dumps(row)]
    file.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UsageError, match=f"mine.jsonl, line 3: .*{says}"):
        local_rows(task, file)


def test_a_file_without_items_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.touch()
    with pytest.raises(SourceError, match=r"mine\.jsonl is empty"):
        evaluate(Request((str(tiny_llama),), tasks=f"choice_local={file}", cost=False))


def test_a_question_of_digits_is_a_question(tiny_llama: Path, tmp_path: Path) -> None:
    """lm-eval took its number for a choice, and asked for the digits after that choice."""
    file = tmp_path / "mine.jsonl"
    file.write_text('{"question": "1", "choices": ["2", "the house"], "answer": 0}\n', "utf-8")
    evaluate(
        Request(
            (str(tiny_llama),), tasks=f"choice_local={file}", cost=False,
            log_samples=str(tmp_path / "samples"),
        )
    )  # fmt: skip
    (logged,) = (tmp_path / "samples").iterdir()
    assert json.loads(logged.read_text(encoding="utf-8"))["arguments"] == [
        ["1", " 2"],
        ["1", " the house"],
    ]


def test_what_else_stands_in_a_row_is_left_out(tiny_llama: Path, tmp_path: Path) -> None:
    """Columns of dates alone, which data sets read as times, and of two types in two rows."""
    file = tmp_path / "mine.jsonl"
    question = {"question": "2024-05-01", "choices": ["2024-05-02", "2024-05-03"], "answer": 1}
    rows = [{**question, "id": 1, "when": "2024-05-01"}, {"id": "b", **question, "when": [2]}]
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    samples = tmp_path / "samples"
    evaluate(
        Request((str(tiny_llama),), tasks=f"choice_local={file}", cost=False, log_samples=str(samples))
    )  # fmt: skip
    (logged,) = samples.iterdir()
    first, second = map(json.loads, logged.read_text("utf-8").splitlines())
    assert first["arguments"] == [["2024-05-01", " 2024-05-02"], ["2024-05-01", " 2024-05-03"]]
    assert first["doc"] == second["doc"] == question


def test_an_unknown_task_is_named(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lm_eval.tasks import TaskManager

    original = TaskManager.__init__

    def empty(self: Any, **options: Any) -> None:  # the whole collection takes ten seconds to read
        original(self, include_path=str(tmp_path), include_defaults=False)

    monkeypatch.setattr(TaskManager, "__init__", empty)
    with pytest.raises(UsageError, match=r"no such task in lm-eval \d.*NAME=FILE\.jsonl"):
        evaluate(Request((str(tiny_llama),), tasks="no_such_task", cost=False))


@pytest.mark.parametrize(
    ("lost", "gained"), [(0, 0), (1, 0), (3, 3), (9, 1), (2, 14), (40, 60), (700, 500)]
)
def test_mcnemar_is_the_exact_binomial_test(lost: int, gained: int) -> None:
    expected = 1.0 if lost + gained == 0 else scipy_stats.binomtest(lost, lost + gained).pvalue
    assert mcnemar(lost, gained) == pytest.approx(expected, rel=1e-9)


def test_pairs_by_hand() -> None:
    pair = paired_metric("1110000111", "1011000010")
    assert (pair.lost, pair.gained, pair.both_right, pair.both_wrong) == (3, 1, 3, 3)
    assert pair.difference == pytest.approx(-0.2)
    differences = [0, -1, 0, 1, 0, 0, 0, -1, 0, -1]
    assert pair.standard_error == pytest.approx(float(scipy_stats.sem(differences)))
    assert paired_metric("1", "0").standard_error is None


def test_results_on_other_items_are_not_paired() -> None:
    def result(items_sha256: str) -> TaskResult:
        return TaskResult(
            task="t",
            version=None,
            lm_eval="0",
            few_shot=0,
            items=2,
            items_available=2,
            items_sha256=items_sha256,
            metrics={"acc": TaskMetric(value=0.5, standard_error=None, correct="10")},
        )

    assert with_pairs(result("a" * 64), result("a" * 64)).paired["acc"].difference == 0
    with pytest.raises(UsageError, match="not given the same items"):
        with_pairs(result("a" * 64), result("b" * 64))
    with pytest.raises(UsageError, match="cannot be paired"):
        paired_metric("10", "100")
    assert math.isclose(mcnemar(1, 1), 1.0)


def test_nothing_is_said_outside_a_git_repository(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    evaluate(Request((str(tiny_llama),), dtype="float32", cost=False, tasks=ARC, limit=1))
    assert "git" not in capfd.readouterr().err
