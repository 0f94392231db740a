"""Where a file of results goes: refused before any work, and written whole."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from llmquant import FileKind, refuse_foreign, replace_file
from llmquant.errors import UsageError
from llmquant_eval.report.files import check_file

RESULTS = Path(__file__).parents[2] / "eval" / "results"


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    """As ``-o /dev/stdout``: a rename would put a file in its place."""
    pipe, got = tmp_path / "pipe", list[str]()
    os.mkfifo(pipe)
    check_file(pipe, FileKind.REPORT)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    replace_file(pipe, "{}\n")
    reader.join(timeout=10)
    assert got == ["{}\n"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_folder_without_permission_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UsageError, match=f"no permission to write in {tmp_path}"):
        check_file(tmp_path / "results.json", FileKind.REPORT)


@pytest.mark.parametrize("command", ["eval --text file:gone", "bench", "compare"])
def test_a_folder_is_no_file(run, command: str, tmp_path: Path) -> None:
    """Before a model or results are looked for."""
    done = run(*command.split(), "gone", "gone2", "-o", tmp_path)
    assert (done.code, f"{tmp_path} is a folder; give a file" in done.said) == (2, True)


@pytest.mark.parametrize(
    "command",
    [
        "eval {0} --text file:{0}/notes.txt --output {1}",
        "bench {0} -o {1}",
        "validate {0} --data {0}/data.jsonl -o {1} --overwrite",
        "validate {0} --data {0}/data.jsonl -o new.json --profile {1} --overwrite",
        "compare a.json b.json -o {1}",
        "compare a.json b.json --markdown {1}",
        "compare a.json b.json --html {1}",
        "leaderboard {0} --markdown {1}",
        "leaderboard {0} --html {1}",
    ],
)
@pytest.mark.parametrize("name", ["config.json", "notes.txt", "index.html", "model.safetensors"])
def test_a_file_of_something_else_is_not_written_over(
    run, command: str, name: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "data.jsonl").write_text('{"prompt": "one"}\n')
    for file, text in (
        ("config.json", '{"model_type": "llama"}'),
        ("notes.txt", "# Notes\n"),
        ("index.html", "<!doctype html><title>mine</title>"),
        ("model.safetensors", "\x08\x00\x00\x00\x00\x00\x00\x00{}"),
    ):
        (folder / file).write_text(text)
    before = (folder / name).read_bytes()
    done = run(*command.format(folder, folder / name).split())
    assert done.code == 2
    assert "is not written over; give another file, or remove it" in done.said or (
        "notes.txt belongs to the text" in done.said
    )
    assert (folder / name).read_bytes() == before


def test_what_llmquant_wrote_is_written_over(tmp_path: Path) -> None:
    """Every kind as its writer writes it, and an empty file, which ``mktemp`` leaves."""
    from matplotlib.figure import Figure

    from llmquant_eval.decide.compare import Bound, compare
    from llmquant_eval.decide.results import Item, ItemResults
    from llmquant_eval.leaderboard.html import render_html
    from llmquant_eval.leaderboard.markdown import render_markdown

    same = ItemResults(model="m", data="d", items=(Item(id="1", scores={"right": 1.0}),))
    begins: dict[str, tuple[FileKind, str]] = {
        "report": (
            FileKind.REPORT,
            (RESULTS / "rtn-w4g128--heldout--ppl-gptq-512.json").read_text(),
        ),
        "items": (FileKind.ITEMS, same.to_json()),
        "verdict": (FileKind.VERDICT, compare(same, same, Bound(0.01)).to_json()),
        "page.html": (FileKind.PAGE, render_html([], "none")),
        "page.md": (FileKind.MARKDOWN, render_markdown([])),
        "verdict.md": (FileKind.MARKDOWN, "# DON'T SHIP\n\nBecause.\n\n- baseline: `a`\n"),
        "empty": (FileKind.VERDICT, ""),
    }
    for name, (kind, text) in begins.items():
        (tmp_path / name).write_text(text)
        check_file(tmp_path / name, kind)
    for suffix in ("png", "svg", "pdf"):
        Figure().savefig(tmp_path / f"plot.{suffix}")
        refuse_foreign(tmp_path / f"plot.{suffix}", FileKind.PLOT)


@pytest.mark.parametrize(
    "beginning",
    [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">",
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Drift of m</title>',
    ],
    ids=["ranking", "drift"],
)
def test_a_page_of_before_pages_had_a_generator_is_replaced(beginning: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(beginning)
    refuse_foreign(page, FileKind.PAGE)
    page.write_text("<!doctype html>\n<html><title>notes</title>")
    with pytest.raises(UsageError, match="is no page of llmquant's"):
        refuse_foreign(page, FileKind.PAGE)
