"""Kept folders of :mod:`quality` on further texts and tasks, so that one text does not decide.

``quality.py run --keep DIR`` leaves the quantized folders; this measures each of them that a
model's cells name, and the original, on texts and lm-eval tasks of one's own. What is measured
already is not measured again.

    python bench/quality.py further --model MODEL --keep DIR --text code=file:code.txt \
        --chat "chat=jsonl:chats.jsonl#messages" --task arc_easy_local=arc.jsonl --limit 300
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

METRICS = ("perplexity_ratio", "kl_mean", "top1_agreement")


def kept(cell: dict[str, Any]) -> str:
    """The name of a cell's folder below ``--keep``."""
    return "-".join(str(cell[k]).replace(" ", "_") for k in ("model", "tool", "grid", "seed"))


def further(args: argparse.Namespace) -> None:
    """Measure what is missing of every kept folder, the original first."""
    report = json.loads(args.out.read_text())
    name = Path(args.model).name
    setting = report["settings"][name]
    asked = {
        "texts": dict(t.split("=", 1) for t in [*args.text, *args.chat]),
        "tasks": [t.partition("=")[0] for t in args.task],
        "windows": args.windows,
        "limit": args.limit,
    }
    if setting.setdefault("further", asked) != asked:
        raise SystemExit(
            f"{args.out} has {name} measured on {setting['further']}; use another --out"
        )
    original = setting.setdefault("original", {})
    cells = [c for c in report["cells"] if c["model"] == name]
    there = [(c, args.keep / kept(c)) for c in cells if (args.keep / kept(c)).is_dir()]
    for entry, folder in [(original, Path(args.model)), *there]:
        for text in [] if entry is original else [*args.text, *args.chat]:
            label, source = text.split("=", 1)
            if label not in entry.setdefault("texts", {}):
                entry["texts"][label] = on_text(folder, source, text in args.chat, args)
        for task in args.task:
            label = task.partition("=")[0]
            if label not in entry.setdefault("tasks", {}):
                entry["tasks"][label] = on_task(folder, task, args)
        partial = args.out.with_suffix(".partial")
        partial.write_text(json.dumps(report, indent=1) + "\n")
        partial.replace(args.out)
        print(folder.name, entry.get("texts"), file=sys.stderr, flush=True)


def on_text(folder: Path, source: str, chat: bool, args: argparse.Namespace) -> dict[str, float]:
    """The metrics of a folder on one text against the original."""
    options = [
        "--reference", args.model, "--text", source, "--window", str(args.seqlen),
        "--max-windows", str(args.windows), "--protocol", "ppl/chat" if chat else "ppl/gptq",
        "--no-noise-floor", "--cache", str(args.keep / "reference"),
    ]  # fmt: skip
    metrics = measured(folder, options, "candidate")["metrics"]
    return {name: metrics[name]["value"] for name in METRICS}


def on_task(folder: Path, task: str, args: argparse.Namespace) -> dict[str, Any]:
    """A folder's score, and which items it had right, a digit each."""
    options = ["--tasks", task, "--limit", str(args.limit)]
    result = measured(folder, options, "candidate")["tasks"][0]
    score = result["metrics"]["acc"]
    return {
        "items": result["items"],
        "score": score["value"],
        "standard_error": score["standard_error"],
        "correct": score["correct"],
    }


def measured(folder: Path, options: Sequence[str], role: str) -> dict[str, Any]:
    """What ``llmquant eval`` says of the model of that role, in float32 with dense weights."""
    main = "from llmquant.cli import main; main()"
    common = ["--dtype", "float32", "--kernel", "dense", "--no-cost", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", main, "eval", str(folder), *options, *common],
        check=True,
        stdout=subprocess.PIPE,
    )
    found: dict[str, Any] = next(m for m in json.loads(done.stdout)["models"] if m["role"] == role)
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command line of ``further``."""
    parser.add_argument("--model", required=True)
    parser.add_argument("--keep", type=Path, required=True, help="where run --keep left folders")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=SOURCE")
    parser.add_argument("--chat", action="append", default=[], metavar="NAME=SOURCE")
    parser.add_argument("--task", action="append", default=[], metavar="TASK=FILE.jsonl")
    parser.add_argument("--limit", type=int, default=300, help="items of a task")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32)
    parser.set_defaults(run=further)
