"""Plots that people look at, from Reports and manifests: PNG to paste, SVG to zoom.

* ``layers-LABEL``: the relative output error of every quantized linear by block, as
  ``manifest.json`` recorded it when the model was quantized (the weight error where no text was
  seen), for candidates whose folder is here and is what was measured.
* ``kl-by-confidence``, ``kl-by-context``: mean KL of each candidate by the probability that the
  reference gives its first choice, and by the tokens that stand before a position; one standard
  error.
* ``front-size``, ``front-speed``: the Pareto plots of a ranking.

Drawn with matplotlib's Agg canvas, which needs no display and no global state. The same data give
the same SVG bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import llmquant
from llmquant.errors import LlmquantError, UsageError
from llmquant_eval.leaderboard.figures import (
    LayerError,
    divergence_figure,
    front_figure,
    layers_figure,
    save,
)
from llmquant_eval.leaderboard.pareto import COST_AXES, pareto_plot
from llmquant_eval.report.results import Breakdown, ModelResult
from llmquant_eval.report.schema import Report
from llmquant_eval.suites.schema import slug

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from llmquant_eval.leaderboard.board import Board

_BLOCK = re.compile(r"^(?P<before>.*?\.)?(?P<block>\d+)\.(?P<leaf>.+)$")


def layer_errors(folder: Path) -> tuple[str, list[LayerError]] | None:
    """``("output error" or "weight error", errors)`` of a folder, None where there is no record of
    errors.

    Raises:
        UsageError: a manifest that is not one.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))["modules"]
        by_name = {
            name: (entry.get("output_error"), entry.get("weight_error"))
            for name, entry in modules.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UsageError(f"{path} is not a manifest of llmquant: {type(e).__name__}: {e}") from e
    for column, kind in enumerate(("output error", "weight error")):
        errors = {name: pair[column] for name, pair in by_name.items() if pair[column] is not None}
        if errors:
            return kind, [_layer(name, float(error)) for name, error in errors.items()]
    return None


def _layer(name: str, error: float) -> LayerError:
    match = _BLOCK.match(name)
    if match is None:
        return LayerError(None, name, error)
    return LayerError(int(match["block"]), match["leaf"].rpartition(".")[2], error)


def write_plots(
    folder: Path,
    reports: Sequence[Report],
    boards: Sequence[Board],
    folders: Mapping[str, Path] | None = None,
) -> list[Path]:
    """Every plot that there is data for, as PNG and SVG; returns the files.

    ``folders`` says where models lie, by label; what is not in it is looked for where its report
    says.

    Raises:
        UsageError: matplotlib is not installed, or nothing can be drawn.
        LlmquantError: the folder cannot be written.
    """
    figures = dict(_figures(reports, boards, folders or {}))
    if not figures:
        raise UsageError(
            f"--plots {folder}: nothing can be drawn: the reports have no KL and fewer than two models, and no model folder has a manifest"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [path for name, figure in figures.items() for path in save(figure, folder, name)]
    except OSError as e:
        raise LlmquantError(f"--plots {folder} cannot be written: {e}") from e


def write_report_plots(folder: Path, report: Report) -> list[Path]:
    """The plots of one run; raises as :func:`write_plots`."""
    from llmquant_eval.leaderboard.board import StoredReport
    from llmquant_eval.leaderboard.ranking import make_boards

    return write_plots(folder, [report], make_boards([StoredReport(Path("report.json"), report)]))


def _figures(
    reports: Sequence[Report], boards: Sequence[Board], folders: Mapping[str, Path]
) -> Iterable[tuple[str, Figure]]:
    candidates = {m.label: m for r in reports for m in r.models if m.role == "candidate"}
    for label, model in candidates.items():
        place = folders.get(label, Path(model.source))
        recorded = layer_errors(place)
        # Of a folder that was made again since, the record says nothing about what was measured.
        if recorded is not None and llmquant.inspect(place).weights_sha256 == model.weights_sha256:
            yield f"layers-{slug(label)}", layers_figure(label, *recorded)
    yield from _breakdowns(boards)
    for number, board in enumerate(boards):
        if board.loss_name is None:
            continue  # a task has no loss
        for kind in COST_AXES:
            plot = pareto_plot(board, kind, board.loss_name)
            if plot is not None:
                name = f"front-{kind}-{slug(board.key.protocol)}{f'-{number}' if number else ''}"
                yield name, front_figure(plot, f"{board.title}\n{board.scope}")


def _breakdowns(boards: Sequence[Board]) -> Iterable[tuple[str, Figure]]:
    """Only breakdowns of one ranking share a plot: others are of other tokens."""
    for number, board in enumerate(boards):
        for by in ("confidence", "context"):
            parts = [
                (row.name, part)
                for row in board.rows
                for part in _own(row.result, board)
                if part.by == by and part.buckets
            ]
            if parts:
                yield (
                    f"kl-by-{by}-{slug(parts[0][1].protocol)}{f'-{number}' if number else ''}",
                    divergence_figure(parts),
                )


def _own(result: ModelResult, board: Board) -> list[Breakdown]:
    return [part for part in result.breakdowns if part.protocol in board.key.protocol.split(" · ")]
