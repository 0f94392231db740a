"""Plots as files: which are drawn, from what, and that a missing source is said rather than drawn
wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import board_kit as kit
import pytest

import llmquant
from llmquant.errors import LlmquantError, UsageError
from llmquant_eval.leaderboard.figures import divergence_figure, front_figure, layers_figure
from llmquant_eval.leaderboard.pareto import COST_AXES, pareto_plot
from llmquant_eval.leaderboard.plots import layer_errors, write_plots
from llmquant_eval.leaderboard.ranking import make_boards
from llmquant_eval.leaderboard.svg import draw
from llmquant_eval.report.schema import Report

PNG = b"\x89PNG\r\n\x1a\n"


def written(folder: Path, *reports: Report, **more: Path) -> list[str]:
    paths = write_plots(folder, reports, make_boards(kit.stored(*reports)), more)
    for path in paths:
        content = path.read_bytes()
        assert content.startswith(PNG if path.suffix == ".png" else b"<?xml")
    return [path.name for path in paths]


def test_every_plot_is_a_png_and_an_svg(tmp_path: Path) -> None:
    expected = ["kl-by-confidence-kl-top-512", "kl-by-context-kl-top-512"]
    expected += [f"front-{kind}-ppl-gptq-512-kl-top-512" for kind in ("size", "speed")]
    assert written(tmp_path, kit.four()) == [
        f"{name}.{kind}" for name in expected for kind in ("png", "svg")
    ]


def test_the_same_reports_give_the_same_svg(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        written(tmp_path / folder, kit.four())
    names = [path.name for path in (tmp_path / "a").glob("*.svg")]
    assert len(names) == 4
    assert all(
        (tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names
    )


def test_a_full_disk_leaves_the_plots_that_were_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, kit.four())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises((OSError, LlmquantError), match="No space left"):
        written(tmp_path, kit.report(kit.candidate("Mine w4", 1.1, 10)))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_layers_are_drawn_from_the_manifest_of_what_was_measured(
    quantized: Path, tmp_path: Path
) -> None:
    sha = llmquant.inspect(quantized).weights_sha256
    report = kit.report(kit.candidate("Mine w4", 1.1, 10, weights_sha256=sha, breakdowns=[]))
    assert written(tmp_path, report, **{"Mine w4": quantized})[:2] == [
        "layers-mine-w4.png",
        "layers-mine-w4.svg",
    ]
    other = kit.report(kit.candidate("Mine w4", 1.1, 10, weights_sha256="e" * 64, breakdowns=[]))
    assert not [
        n for n in written(tmp_path, other, **{"Mine w4": quantized}) if n.startswith("layers")
    ]


def test_a_bar_for_every_linear(quantized: Path) -> None:
    recorded = layer_errors(quantized)
    assert recorded is not None
    kind, errors = recorded
    entries = json.loads((quantized / "manifest.json").read_text(encoding="utf-8"))["modules"]
    assert kind == "output error"
    assert sorted(e.error for e in errors) == sorted(
        entry["output_error"] for entry in entries.values()
    )
    assert {(e.block, e.leaf) for e in errors} == {
        (block, leaf) for block in (0, 1)
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }  # fmt: skip
    (axes,) = layers_figure("m", kind, errors).axes
    assert sorted(bar.get_height() for bar in axes.patches) == sorted(e.error for e in errors)


def test_a_folder_without_a_record_has_no_layers(base_model: Path) -> None:
    assert layer_errors(base_model) is None


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"modules": 1}'], ids=["not JSON", "a list", "no modules"]
)
def test_a_damaged_manifest_is_named(content: str, quantized: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(quantized, tmp_path / "damaged"))
    (folder / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=r"manifest\.json is not a manifest"):
        layer_errors(folder)


def test_lines_go_through_the_buckets(tmp_path: Path) -> None:
    parts = [
        (m.label, part)
        for m in kit.four().models[1:]
        for part in m.breakdowns
        if part.by == "context"
    ]
    (axes,) = divergence_figure(parts).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    drawn = [
        line
        for line in axes.lines
        if len(line.get_xdata()) == 4 and line.get_marker() not in ("_", "|")
    ]
    assert [list(line.get_ydata()) for line in drawn] == [
        [b.kl_mean for b in part.buckets] for _, part in parts
    ]


def test_one_model_has_no_front() -> None:
    (alone,) = make_boards(kit.stored(kit.report(base=kit.reference())))
    assert pareto_plot(alone, "size", "perplexity") is None


@pytest.mark.parametrize("loss", ["kl_mean", "perplexity_ratio"])
@pytest.mark.parametrize("kind", sorted(COST_AXES))
def test_a_file_shows_the_points_and_axes_of_the_plot(kind: str, loss: str) -> None:
    (board,) = make_boards(kit.stored(kit.four()))
    plot = pareto_plot(board, kind, loss)
    assert plot is not None
    figure = front_figure(plot, "title")
    (axes,) = figure.axes
    assert {annotation.get_text() for annotation in axes.texts} == {p.row.name for p in plot.points}
    assert axes.get_xlim() == (plot.cost_scale.low, plot.cost_scale.high)
    assert axes.get_ylim() == (plot.loss_scale.low, plot.loss_scale.high)
    assert axes.get_yscale() == ("log" if loss == "kl_mean" else "linear")
    assert list(axes.get_xticks()) == plot.cost_scale.ticks()
    assert list(axes.get_yticks()) == plot.loss_scale.ticks()
    drawn = draw(plot)
    for text in (*axes.get_xticklabels(), *axes.get_yticklabels(), axes.xaxis.label):
        assert f">{text.get_text()}</text>" in drawn
    steps = max(axes.lines, key=lambda line: len(line.get_xdata()))
    assert list(zip(steps.get_xdata(), steps.get_ydata(), strict=True)) == [
        (p.x, p.y) for p in plot.front_line()
    ]


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    report = kit.report(base=kit.reference())
    with pytest.raises(UsageError, match="nothing can be drawn"):
        written(tmp_path / "plots", report)
    assert not (tmp_path / "plots").exists()
