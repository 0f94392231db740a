"""``llmquant compare`` on files: what it decides, what it accepts, what it refuses."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
from children import Run

from llmquant_eval.decide.compare import holm
from llmquant_eval.decide.read import read_results
from llmquant_eval.decide.results import ItemResults


def results(folder: Path, name: str, scores: list[dict[str, float]], **more) -> Path:
    """A result file; ``scores`` item by item, ``more`` fields of the file."""
    items = [
        {"id": f"q{i}", "scores": s, "prompt": f"What is <b>{i}</b>?", "answer": f"`{name}` | {i}"}
        for i, s in enumerate(scores)
    ]
    path = folder / f"{name}.json"
    whole = {
        "kind": "items",
        "schema_version": 1,
        "model": name,
        "data": "prod.jsonl",
        "items": items,
    }
    path.write_text(json.dumps(whole | more))
    return path


def right(count: int, lost: int = 0, gained: int = 0) -> list[dict[str, float]]:
    """Half of the items are right, the first ``lost`` of them not, of the others ``gained`` too."""
    half = count // 2
    values = [1.0] * half + [0.0] * (count - half)
    values[:lost] = [0.0] * lost
    values[half : half + gained] = [1.0] * gained
    return [{"accuracy": v} for v in values]


def test_a_report_does_not_take_the_place_of_results(run: Run, tmp_path):
    base, candidate = (results(tmp_path, name, right(400)) for name in ("base", "cand"))
    before = candidate.read_bytes()
    for named in (candidate, f"{candidate}#cand"):
        done = run("compare", base, named, "-o", candidate)
        assert (done.code, "which is read here" in done.said) == (2, True)
    assert candidate.read_bytes() == before


@pytest.mark.parametrize(
    ("count", "lost", "gained", "code", "says"),
    [
        (400, 0, 0, 0, "SHIP"),
        (100, 0, 0, 3, "INCONCLUSIVE"),
        (100, 1, 1, 3, "INCONCLUSIVE"),
        (2000, 9, 9, 0, "SHIP"),
        (400, 30, 5, 1, "DON'T SHIP"),
        (2, 1, 0, 3, "INCONCLUSIVE"),
        (1, 0, 0, 3, "INCONCLUSIVE"),
    ],
)
def test_the_exit_code_is_the_decision(run: Run, tmp_path, count, lost, gained, code, says):
    base = results(tmp_path, "base", right(count))
    candidate = results(tmp_path, "cand", right(count, lost, gained))
    done = run("compare", base, candidate)
    assert (done.code, done.out.split(":")[0]) == (code, says), done
    verdict = json.loads(run("compare", base, candidate, "--json").out)
    assert verdict["decision"] == says
    flips = verdict["metrics"][0]["flips"]
    assert (flips["lost"], flips["gained"]) == (lost, gained)
    if says == "INCONCLUSIVE" and verdict["metrics"][0]["needed"]:
        assert verdict["metrics"][0]["needed"] > count


def test_items_that_are_said_to_settle_it_do_for_several_metrics(run: Run, tmp_path):
    """Holm's correction makes it more than for one metric."""
    metrics = ("a", "b", "c", "d", "e", "f")

    def of(count: int, name: str) -> Path:
        return results(tmp_path, name, [dict.fromkeys(metrics, 1.0)] * count)

    done = run("compare", of(299, "base"), of(299, "cand"), "--json")
    needed = {m["needed"] for m in json.loads(done.out)["metrics"]}
    assert (done.code, needed) == (3, {580})
    assert run("compare", of(580, "base"), of(580, "cand")).code == 0


def test_what_was_measured_otherwise_is_refused_or_said(run: Run, tmp_path):
    asked = {"conditions": {"generation": "greedy, at most 8 tokens"}}
    base = results(tmp_path, "base", right(400), **asked, computing={"dtype": "float32"})
    other = results(
        tmp_path, "o", right(400), conditions={"generation": "greedy, at most 9 tokens"}
    )
    done = run("compare", base, other)
    assert (done.code, "base and o were not asked alike, generation: greedy" in done.said) == (
        2,
        True,
    )
    done = run("compare", base, results(tmp_path, "l", right(400), lower_is_better=["accuracy"]))
    assert (done.code, "of accuracy less is better in one of the results" in done.said) == (2, True)
    alike = results(tmp_path, "alike", right(400), **asked, computing={"dtype": "bfloat16"})
    done = run("compare", base, alike)
    assert (done.code, "note: dtype: float32 for the baseline" in done.out) == (
        0,
        True,
    )


def test_margins_are_points_of_accuracy_and_a_share_of_other_scores(run: Run, tmp_path):
    draw = random.Random(0)
    scores = [{"accuracy": 1.0, "log_likelihood": -2 + draw.random()} for _ in range(500)]
    worse = [s | {"log_likelihood": s["log_likelihood"] - 0.03} for s in scores]
    files = results(tmp_path, "a", scores), results(tmp_path, "b", worse)
    assert run("compare", *files).code == 1  # 2 % of the mean of -1.5
    verdict = json.loads(run("compare", *files, "--margin", "log_likelihood=4%", "--json").out)
    assert verdict["decision"] == "SHIP"
    margins = {m["metric"]: (round(m["margin"], 3), m["margin_text"]) for m in verdict["metrics"]}
    assert margins["accuracy"] == (0.01, "1 point")
    assert margins["log_likelihood"][1] == "4 % of the baseline"
    assert run("compare", *files, "--metric", "accuracy").code == 0


def test_lower_is_better_turns_the_sign(run: Run, tmp_path):
    base = [{"loops": float(i % 50 == 0)} for i in range(1000)]
    more = [{"loops": float(i % 10 == 0)} for i in range(1000)]
    lower = {"lower_is_better": ["loops"]}
    files = results(tmp_path, "a", base, **lower), results(tmp_path, "b", more, **lower)
    verdict = json.loads(run("compare", *files, "--json").out)["metrics"][0]
    assert verdict["decision"] == "DON'T SHIP"
    assert (verdict["baseline"], verdict["candidate"]) == (0.02, 0.1)
    assert verdict["difference"] == pytest.approx(-0.08)
    assert verdict["method"] == "exact score test (Tango)"
    assert (verdict["flips"]["lost"], verdict["flips"]["gained"]) == (80, 0)
    assert run("compare", *reversed(files)).code == 0


def test_a_name_of_no_metric_among_those_of_which_less_is_better_is_refused(run: Run, tmp_path):
    """Slower was SHIP where the list said ``second`` and the items ``seconds``."""
    base = [{"seconds": 1 + i % 7 / 10} for i in range(400)]
    slower = [{"seconds": 1.3 + i % 7 / 10} for i in range(400)]
    lower = {"lower_is_better": ["second"]}
    files = results(tmp_path, "a", base, **lower), results(tmp_path, "b", slower, **lower)
    ran = run("compare", *files)
    assert ran.code == 2
    assert (
        "lower_is_better names 'second', which no item has a score of; they have seconds" in ran.err
    )


def test_a_mean_of_zero_has_no_sign(run: Run, tmp_path):
    files = [results(tmp_path, n, [{"loops": 0.0}] * 400, lower_is_better=["loops"]) for n in "ab"]
    assert "0 % → 0 %, difference +0 points" in run("compare", *files).out


def test_items_of_one_conversation_are_not_independent(run: Run, tmp_path):
    """Three hundred items that are the same thirty times ten do not suffice."""

    def grouped(name: str) -> Path:
        path = results(tmp_path, name, [{"accuracy": 1.0}] * 300)
        whole = json.loads(path.read_text())
        for i, item in enumerate(whole["items"]):
            item["group"] = f"talk {i // 10}"
        path.write_text(json.dumps(whole))
        return path

    files = grouped("a"), grouped("b")
    done = run("compare", *files)
    assert done.code == 3
    assert "300 items in 30 groups" in done.out
    alone = results(tmp_path, "c", [{"accuracy": 1.0}] * 300)
    assert run("compare", alone, alone).code == 0


@pytest.mark.parametrize("group", ["one talk", None])
def test_a_single_group_or_item_is_no_sample(run: Run, tmp_path, group):
    """Nothing is known of its spread, which is not the same as a difference at the margin."""
    items = [{"answer_tokens": 5.0}] * (3 if group else 1)
    files = [results(tmp_path, name, items) for name in "ab"]
    for path in files:
        whole = json.loads(path.read_text())
        for item in whole["items"]:
            item["group"] = group
        path.write_text(json.dumps(whole))
    done = run("compare", *files)
    assert done.code == 3
    assert ("3 items in 1 group;" if group else "1 item;") in done.out
    assert "One item, or one group of items, decides nothing, so give more of them." in done.out
    assert "equals the margin" not in done.out


def test_many_metrics_need_more_evidence(run: Run, tmp_path):
    """Holm: thirty metrics that would each pass alone do not all pass together."""
    one = results(tmp_path, "one", [{"m0": 1.0}] * 320)
    many = results(tmp_path, "many", [{f"m{i}": 1.0 for i in range(30)}] * 320)
    assert run("compare", one, one).code == 0
    assert run("compare", many, many).code == 3


def test_holm_is_the_textbooks():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.7, 0.9]) == [1.0, 1.0]


def test_a_page_and_markdown_show_what_changed(run: Run, tmp_path):
    base = results(tmp_path, "base", right(400))
    candidate = results(tmp_path, "cand", right(400, 30, 5))
    html, markdown, out = (tmp_path / n for n in ("v.html", "v.md", "v.json"))
    done = run(
        "compare",
        base,
        candidate,
        "--html",
        html,
        "--markdown",
        markdown,
        "-o",
        out,
        "--examples",
        "2",
    )
    assert done.code == 1
    page = html.read_text()
    assert "<b>0</b>" not in page
    assert "&lt;b&gt;0&lt;/b&gt;" in page
    assert "Lost: 30, 2 of them." in markdown.read_text()
    assert page.count("<li><code>q") == 4
    assert json.loads(out.read_text())["decision"] == "DON'T SHIP"


def lm_eval_line(i: int, **metrics: float) -> str:
    return json.dumps(
        {"doc_id": i, "doc_hash": f"h{i}", "filter": "none", "metrics": list(metrics), **metrics,
         "arguments": {"gen_args_0": {"arg_0": f"Question {i}"}}, "filtered_resps": [[-1.0, False]]}
    )  # fmt: skip


def test_what_lm_eval_logged(run: Run, tmp_path):
    for model, wrong in (("base", 0), ("cand", 40)):
        folder = tmp_path / model / "org__model"
        folder.mkdir(parents=True)
        for task in ("arc_easy", "piqa"):
            lines = [
                lm_eval_line(i, acc=float(i >= wrong), word_perplexity=[-3.0, 7])
                for i in range(500)
            ]
            (folder / f"samples_{task}_2026-11-26T10-00-00.123456.jsonl").write_text(
                "\n".join(lines) + "\n"
            )
    done = run("compare", tmp_path / "base", tmp_path / "cand", "--json")
    assert done.code == 1
    verdict = json.loads(done.out)
    assert [m["metric"] for m in verdict["metrics"]] == ["arc_easy/acc", "piqa/acc"]
    assert any("word_perplexity" in note for note in verdict["notes"])
    assert verdict["metrics"][0]["flips"]["lost_examples"][0]["prompt"] == "Question 0"


BAD = [
    ("not json", "{", "is not JSON"),
    ("nothing", "", "is not JSON"),
    ("digits", "9" * 6000, "is not JSON"),
    ("brackets", "[" * 100_000, "is not JSON"),
    ("a list", "[]", "no results item by item"),
    ("no items", '{"kind": "items", "model": "m", "data": "d", "items": []}', "items"),
    ("NaN", '{"kind": "items", "model": "m", "data": "d", "items": [{"id": "q7", "scores": {"a": NaN}}]}', "item q7: scores.a"),
    ("text for a score", '{"kind": "items", "model": "m", "data": "d", "items": [{"id": "q7", "scores": {"a": "x"}}]}', "item q7: scores.a"),
    ("twice", '{"kind": "items", "model": "m", "data": "d", "items": [{"id": "q", "scores": {}}, {"id": "q", "scores": {}}]}', "'q' is there more than once"),
    ("no id", '{"kind": "items", "model": "m", "data": "d", "items": [{"scores": {"a": 1}}]}', "item 0: id"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "says"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_a_bad_file_is_named(run: Run, tmp_path, text, says):
    good, bad = results(tmp_path, "good", right(10)), tmp_path / "bad.json"
    bad.write_text(text)
    for files in ((good, bad), (bad, good)):
        done = run("compare", *files)
        assert (done.code, done.out) == (2, "")
        assert says in done.err
        assert "bad.json" in done.err


@pytest.mark.parametrize(
    ("line", "says"),
    [("{", "line 2 is not JSON"), ("{}", "line 2 has no doc_id"), (lm_eval_line(1, acc=math.nan), "line 2: acc is nan"),
     ("9" * 6000, "line 2 is not JSON"), (lm_eval_line(0, acc=1.0), "is there more than once"),
     (lm_eval_line(1).replace("[]", '["acc"]'), "line 2: acc is missing")],
)  # fmt: skip
def test_a_bad_line_is_named(run: Run, tmp_path, line, says):
    file = tmp_path / "samples_t.jsonl"
    file.write_text(f"{lm_eval_line(0, acc=1.0)}\n{line}\n")
    done = run("compare", file, file)
    assert (done.code, done.out) == (2, "")
    assert says in done.err


@pytest.mark.parametrize("name", ["items.json", "samples_t.jsonl", "."])
def test_a_label_where_nothing_has_labels(run: Run, tmp_path, name):
    (tmp_path / "samples_t.jsonl").write_text(lm_eval_line(0, acc=1.0))
    item = (
        '{"kind": "items", "model": "m", "data": "d", "items": [{"id": "q", "scores": {"a": 1}}]}'
    )
    (tmp_path / "items.json").write_text(item)
    done = run("compare", f"{tmp_path / name}#w4", tmp_path / "items.json")
    assert (done.code, done.out, "#w4 chooses none" in done.err) == (2, "", True)


def test_a_file_of_another_encoding_in_a_folder_is_named(run: Run, tmp_path):
    (tmp_path / "samples_t.jsonl").write_bytes(lm_eval_line(0, acc=1.0).encode("utf-16"))
    done = run("compare", tmp_path, tmp_path)
    assert (done.code, done.out, "samples_t.jsonl cannot be read" in done.err) == (2, "", True)


LM_EVAL_METRICS = {
    "acc": False, "word_perplexity": True, "perplexity": True, "ter": True, "wer": True, "bits_per_byte": True,
    "character_f1": False, "parameter_match": False, "lossless_match": False,
}  # fmt: skip


def test_which_metrics_of_lm_eval_are_better_when_lower(run: Run, tmp_path):
    """Whole names count, not parts of them."""
    values = dict.fromkeys(LM_EVAL_METRICS, 1.0)
    line = lm_eval_line(0, **values).replace('"none"', '"strict-match"')
    (tmp_path / "samples_t.jsonl").write_text(line)
    lower = read_results(str(tmp_path)).lower_is_better
    assert {n.removeprefix("t/").removesuffix(",strict-match") for n in lower} == {
        name for name, wanted in LM_EVAL_METRICS.items() if wanted
    }


@pytest.mark.parametrize("option", ["--html", "--markdown", "-o"])
def test_a_folder_that_is_not_there_is_named_first(run: Run, tmp_path, option):
    done = run("compare", "gone.json", "gone.json", option, tmp_path / "no" / "x")
    assert (done.code, "does not exist; make it first" in done.said) == (2, True)


def test_other_items_are_no_comparison(run: Run, tmp_path):
    ten, nine = results(tmp_path, "ten", right(10)), results(tmp_path, "nine", right(9))
    done = run("compare", ten, nine)
    assert done.code == 2
    assert "1 of 10 items of ten are not in nine (such as q9)" in done.err
    assert run("compare", nine, ten).code == 2
    other = results(tmp_path, "other", [{"f1": 1.0}] * 10)
    done = run("compare", ten, other)
    assert (done.code, "has no metric" in done.err) == (2, True)
    hashes = [results(tmp_path, f"h{c}", right(10), data_sha256=c * 64) for c in "ab"]
    assert "different data" in run("compare", *hashes).err


@pytest.mark.parametrize(
    ("options", "says"),
    [(("--margin", "1%", "--margin", "2%"), "--margin 2% is the second one for all metrics"),
     (("--margin", "f1=1%", "--margin", "f1=2%"), "--margin f1=2% is the second one of f1"),
     (("--margin", "x"), "is no share"), (("--margin", "=1%"), "is no share"), (("--margin", "0"), "not between"), (("--margin", "120%"), "not between"),
     (("--margin", "nan"), "not between"), (("--margin", "f1=1%"), "no metric 'f1'"), (("--alpha", "0"), "alpha"),
     (("--alpha", "0.5"), "alpha"), (("--power", "1"), "power"), (("--metric", "f1"), "no metric 'f1'")],
)  # fmt: skip
def test_misuse_is_named(run: Run, tmp_path, options, says):
    file = results(tmp_path, "a", right(10))
    done = run("compare", file, file, *options)
    assert (done.code, done.out) == (2, "")
    assert says in done.err


def test_missing_files_and_neutral_fields(run: Run, tmp_path):
    file = results(tmp_path, "a", right(400), notes=[], lower_is_better=[], data_sha256=None)
    assert run("compare", file, tmp_path / "gone.json").code == 2
    assert run("compare", file, tmp_path).code == 2
    assert run("compare", file, file).code == 0
    read = ItemResults.model_validate_json(file.read_text())
    assert ItemResults.model_validate_json(read.to_json()) == read
