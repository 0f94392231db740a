"""What is ranked with what, in which order, and what a hostile label can do to the files:
nothing."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import board_kit as kit
import pytest
import typer
from typer.testing import CliRunner

from llmquant.errors import LlmquantError, UsageError
from llmquant_eval.cli import register
from llmquant_eval.leaderboard.app import table
from llmquant_eval.leaderboard.board import Board
from llmquant_eval.leaderboard.cells import columns, notes
from llmquant_eval.leaderboard.html import render_html
from llmquant_eval.leaderboard.markdown import render_markdown
from llmquant_eval.leaderboard.pareto import pareto_front, pareto_plots, pareto_points
from llmquant_eval.leaderboard.ranking import make_boards
from llmquant_eval.leaderboard.svg import draw
from llmquant_eval.report.schema import Report, Settings

EVIL = "<img src=x onerror=alert(1)>\"'|`[a](b)` {{boards}} & \x1b[2J\u202e"


def boards(*reports: Report) -> list[Board]:
    return make_boards(kit.stored(*reports))


def test_the_reference_first_then_by_loss() -> None:
    (board,) = boards(kit.four())
    assert [(row.name, row.rank) for row in board.rows] == [
        ("base", None),
        ("good", 1),
        ("small", 2),
        ("bad", 3),
    ]
    assert [c.title for c in columns(board)][:2] == ["ratio", "perplexity"]
    assert board.title == "ppl/gptq-512 · kl/top-512 on file:t.txt"


def test_a_kernel_that_rounds_activations_makes_a_row_of_its_own() -> None:
    """``auto`` never takes one, so it was asked for."""
    reports = [
        kit.report(
            kit.candidate("small", ratio, 3_000_000, kernels={kernel: 42}),
            settings=Settings(dtype="bfloat16", device="cpu", kernel=kernel, batch_size=None),
        )
        for kernel, ratio in (("cpu", 1.1), ("cpu_int8", 1.2))
    ]
    (board,) = make_boards(kit.stored(*reports))
    assert [row.name for row in board.rows] == ["base", "small", "small, kernel cpu_int8"]


def test_the_noise_floor_of_a_ranking_in_float32_is_not_called_rounding() -> None:
    """A smaller KL is one that was measured there."""
    for dtype, says in (
        ("bfloat16", "Less is rounding."),
        ("float32", "A smaller KL is less than"),
    ):
        settings = Settings(dtype=dtype, device="cpu", kernel="auto", batch_size=None)
        (board,) = make_boards(
            kit.stored(kit.report(kit.candidate("a", 1.1, 3_000_000), settings=settings))
        )
        assert any(says in note for note in notes(board))


def test_the_reference_has_no_command_of_its_own() -> None:
    """It is measured beside each of the others."""
    page = render_html(make_boards(kit.stored(kit.four())), "Ours")
    assert page.count("To repeat this row, measured beside another:<pre>") == 1
    assert page.count("To repeat this row:<pre>") == 3


def test_reports_of_one_kind_make_one_ranking_and_the_newest_counts() -> None:
    a, b = kit.candidate("a", 1.1, 10), kit.candidate("b", 1.2, 10)
    newer = kit.candidate("a", 1.3, 10)
    (board,) = boards(kit.report(a), kit.report(b), kit.report(newer))
    assert [(row.name, row.metrics["perplexity_ratio"].value) for row in board.rows[1:]] == [
        ("b", 1.2),
        ("a", 1.3),
    ]
    (board,) = boards(
        kit.report(kit.candidate("a", 1.1, 10)),
        kit.report(kit.candidate("a", 1.2, 10, weights_sha256="e" * 64)),
    )
    assert [row.name[:3] for row in board.rows[1:]] == [
        "a (",
        "a (",
    ]  # two models of one label are told apart


def test_a_report_without_speeds_leaves_the_reference_its_own() -> None:
    a, b = kit.candidate("a", 1.1, 10, 80.0), kit.candidate("b", 1.2, 10)
    timed = kit.report(a, base=kit.reference(20.0))
    (board,) = boards(timed, kit.report(b))
    assert [row.decode_speed for row in board.rows] == [20.0, 80.0, None]
    (board,) = boards(timed, kit.report(b, base=kit.reference(30.0)))
    assert board.rows[0].decode_speed == 30.0


DIFFERENT: list[Any] = [
    pytest.param(lambda r: {"text": r.text.model_copy(update={"sha256": "f" * 64})}, id="text"),
    pytest.param(lambda r: {"passes": [kit.one_pass(1, 2)]}, id="windows"),
    pytest.param(
        lambda r: {"settings": r.settings.model_copy(update={"dtype": "float32"})}, id="dtype"
    ),
    pytest.param(
        lambda r: {"models": [kit.reference(weights_sha256="e" * 64), *r.models[1:]]},
        id="reference",
    ),
    pytest.param(
        lambda r: {
            "models": [m.model_copy(update={"tokenizer_sha256": "f" * 64}) for m in r.models]
        },
        id="tokenizer",
    ),
]


def cut(ids: str | None) -> dict[str, Any]:
    return {"passes": [kit.one_pass().model_copy(update={"ids_sha256": ids and ids * 64})]}


@pytest.mark.parametrize(
    ("ids", "rankings"),
    [
        ("aa", [{"a", "b"}]),
        ("a-", [{"a", "b"}]),  # an older report does not say them
        ("ab", [{"a"}, {"b"}]),
        ("ab-", [{"a"}, {"b"}, {"c"}]),
    ],
)
def test_other_token_ids_are_another_ranking(ids: str, rankings: list[set[str]]) -> None:
    """A BOS more, or another chat template: the vocabulary is the same."""
    reports = []
    for name, one in zip("abc", ids, strict=False):
        report = kit.report(kit.candidate(name, 1.1, 10))
        reports.append(report.model_copy(update=cut(None if one == "-" else one)))
    found = boards(*reports)
    assert [{r.name for r in board.rows if not r.is_reference} for board in found] == rankings
    told = [note for board in found for note in notes(board) if "Token ids sha256" in note]
    assert len(told) == (0 if len(rankings) == 1 else 2)


@pytest.mark.parametrize("change", DIFFERENT)
def test_what_differs_is_never_ranked_together(change: Callable[[Report], dict[str, Any]]) -> None:
    first = kit.report(kit.candidate("a", 1.1, 10))
    second = kit.report(kit.candidate("b", 1.2, 10))
    assert len(boards(first, second)) == 1
    apart = boards(first, second.model_copy(update=change(second)))
    assert len(apart) == 2
    assert not any({"a", "b"} <= {row.name for row in board.rows} for board in apart)


def test_two_protocols_of_one_run_are_two_rankings() -> None:
    other = "ppl/strided-512-256"
    metrics = kit.candidate("a", 1.1, 10).metrics
    metrics |= {f"perplexity_ratio@{other}": kit.metric(1.3, 0.1, "ratio", other)}
    report = kit.report(
        kit.candidate("a", 1.1, 10, metrics=metrics),
        passes=[kit.one_pass(), kit.one_pass(perplexity=other, divergence="kl/x")],
    )
    found = {
        board.key.protocol: board.rows[1].metrics["perplexity_ratio"].value
        for board in boards(report)
    }
    assert found == {"ppl/gptq-512 · kl/top-512": 1.1, "ppl/strided-512-256 · kl/x": 1.3}


def test_a_partial_run_is_marked_and_not_ranked() -> None:
    (board,) = boards(kit.four().model_copy(update={"passes": [kit.one_pass(2, 242)]}))
    assert [(row.name, row.rank) for row in board.rows] == [
        ("base", None),
        ("bad", None),
        ("good", None),
        ("small", None),
    ]
    assert not any(p.best for p in pareto_points(board, "size", "kl_mean"))
    for rendered in (render_markdown([board]), render_html([board])):
        assert "artial, not ranked: the first 2 of 242 windows" in rendered
    assert 'name="front"' not in render_html([board])
    assert "| – | good |" in render_markdown([board])


def test_tasks_are_ranked_by_right_answers_and_shown_with_their_flips() -> None:
    models = [
        kit.candidate(label, 1.1, 10, metrics={}, tasks=[kit.task(c)])
        for label, c in (("a", "1100"), ("b", "1110"))
    ]
    base = kit.reference(metrics={}, tasks=[kit.task("1111")])
    (board,) = boards(
        kit.report(
            *models, base=base, passes=[], text=None, noise_floor=None, protocols=["task/choice"]
        )
    )
    assert [(row.name, row.rank) for row in board.rows] == [("base", None), ("b", 1), ("a", 2)]
    partial = [
        m.model_copy(update={"tasks": [kit.task("11", items_available=9)]}) for m in (base, *models)
    ]
    (board,) = boards(
        kit.report(*partial[1:], base=partial[0], passes=[], text=None, noise_floor=None)
    )
    assert board.partial
    assert {row.rank for row in board.rows} == {None}


@pytest.mark.parametrize(
    ("points_", "expected"),
    [
        pytest.param([(1, 1)], [True], id="alone"),
        pytest.param(
            [(1, 2), (2, 1), (2, 2)], [True, True, False], id="beaten in one, equal in the other"
        ),
        pytest.param([(1, 1), (1, 1)], [True, True], id="equal"),
        pytest.param([(1, 3), (2, 2), (3, 1)], [True] * 3, id="all"),
    ],
)
def test_a_front_is_what_nothing_beats(
    points_: list[tuple[float, float]], expected: list[bool]
) -> None:
    assert pareto_front(points_) == expected


def test_pareto_plots_of_size_and_of_speed_with_whiskers() -> None:
    (board,) = boards(kit.four())
    assert [(p.kind, p.loss) for p in pareto_plots(board)] == [
        ("size", "kl_mean"),
        ("size", "perplexity_ratio"),
        ("speed", "kl_mean"),
        ("speed", "perplexity_ratio"),
    ]
    best = {
        kind: [p.row.name for p in pareto_points(board, kind, "perplexity_ratio") if p.best]
        for kind in ("size", "speed")
    }
    assert best == {"size": ["base", "good", "small"], "speed": ["base", "good", "small"]}
    by_loss = {p.loss: draw(p) for p in pareto_plots(board) if p.kind == "size"}
    assert (
        by_loss["perplexity_ratio"].count('class="whisker"') == 3
    )  # the reference's ratio has no error
    assert (
        by_loss["kl_mean"].count('class="dot"') == 3
    )  # and its KL of 0 no place on a logarithmic axis


def test_speeds_of_two_machines_do_not_share_a_plot() -> None:
    elsewhere = kit.report(kit.candidate("far", 1.05, 4_000_000, 900.0))
    there = elsewhere.model_copy(
        update={"hardware": elsewhere.hardware.model_copy(update={"processor": "Another CPU"})}
    )
    (board,) = boards(kit.four(), there)
    assert "far" not in [p.row.name for p in pareto_points(board, "speed", "perplexity_ratio")]
    assert "far" in [p.row.name for p in pareto_points(board, "size", "perplexity_ratio")]
    assert "comparable only within one" in render_markdown([board])


def test_every_row_shows_the_command_that_repeats_it() -> None:
    """In Markdown the reference has none: the commands of the others measure it too."""
    shown = boards(kit.four())
    lines = render_markdown(shown).splitlines()
    assert (
        lines.count("llmquant quantize m -o out/x")
        == lines.count("llmquant eval out/x --text file:t.txt")
        == 3
    )
    assert render_html(shown).count("llmquant eval out/x --text file:t.txt") == 4


class _Tags(HTMLParser):
    """Elements and attributes of a page, and where labels stand."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_a_hostile_label_is_only_text() -> None:
    report = kit.report(
        kit.candidate(EVIL, 1.1, 3_000_000, 50.0, scheme=EVIL),
        kit.candidate("b", 1.2, 4_000_000, 60.0),
    )
    report = report.model_copy(update={"command": f"llmquant eval '{EVIL}'\n```\n<b>"})
    shown = boards(report)
    page = render_html(shown, title=f"{EVIL}{{{{introduction}}}}")
    tags = _Tags(page).tags
    assert not [
        tag
        for tag, attributes in tags
        if tag in ("img", "b") or any(a.startswith("on") for a in attributes)
    ]
    names = [attributes["data-row"] for tag, attributes in tags if tag == "tbody"]
    assert names[1] == EVIL.replace("\x1b", "\ufffd").replace("\u202e", "\ufffd")
    assert page.count("<section") == 1
    assert "\x1b" not in page
    text = render_markdown(shown)
    row = next(line for line in text.splitlines() if line.startswith("| 1 |"))
    assert row.replace("\\|", "").count("|") == 4 + len(columns(shown[0]))
    assert "<img" not in row.replace("\\<img", "")
    assert "\x1b" not in text
    assert "````sh" in text  # a fence longer than what the command holds
    assert table(shown[0])[2][1][1] == names[1]


def command_line() -> typer.Typer:
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    return app


def run(*arguments: object) -> Any:
    outcome = CliRunner().invoke(command_line(), ["leaderboard", *map(str, arguments)])
    if isinstance(outcome.exception, LlmquantError):
        raise outcome.exception
    return outcome


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "four.json").write_text(kit.four().to_json(), encoding="utf-8")
    return folder


def test_files_are_written_and_the_terminal_shows_what_is_not(
    results: Path, tmp_path: Path
) -> None:
    assert "good" in run(results).stdout
    outcome = run(
        results, "--markdown", tmp_path / "b.md", "--html", tmp_path / "b.html", "--title", "Ours"
    )
    assert outcome.stdout == ""
    assert (tmp_path / "b.md").read_text(encoding="utf-8").startswith("# Leaderboard\n")
    assert "<title>Ours</title>" in (tmp_path / "b.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        pytest.param(None, [], "has no \\*.json report in it", id="empty folder"),
        pytest.param("{", [], "bad.json is not JSON", id="not JSON"),
        pytest.param("{}", [], "schema_version None", id="not a report"),
        pytest.param(
            '{"schema_version": 2}',
            [],
            "schema_version 2, of a newer llmquant.*Update llmquant",
            id="newer",
        ),
        pytest.param(
            '{"schema_version": 1}',
            [],
            "bad.json: created: Field required; give a report as `llmquant eval --output` writes",
            id="fields missing",
        ),
        pytest.param(
            "{report}",
            ["--html", "{tmp}/no/x.html"],
            "does not exist; make it first",
            id="no folder for the page",
        ),
        pytest.param(
            "{nothing}", [], "neither a protocol nor a task", id="a report that measured nothing"
        ),
    ],
)
def test_results_that_cannot_be_shown(
    content: str | None, options: list[str], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    known = {"{report}": kit.four(), "{nothing}": kit.report(passes=[], text=None)}
    if content is not None:
        text = known[content].to_json() if content in known else content
        (folder / "bad.json").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        run(folder, *(option.format(tmp=tmp_path) for option in options))
    assert not list(tmp_path.glob("*.html"))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a folder of reports; `llmquant eval"):
        run(tmp_path / "none")
