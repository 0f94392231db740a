"""Compare two quantizations of one model with the original: RTN without text, GPTQ with some.

    python examples/evaluate_two_models.py [FOLDER]

FOLDER (out/two-models unless given) gets both models and the report. 8 windows of 512 tokens keep
it short: enough for KL to tell these two apart, too few for a claim. Took 70 seconds on two cores.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import llmquant

MODEL = Path(__file__).resolve().parent / "tiny-llama"


def quantized(folder: Path, name: str, changes: dict[str, Any] | None = None) -> Path:
    """The model by a shipped recipe, with some of its keys changed."""
    recipe = llmquant.load_recipe(name).updated(changes or {})
    options = llmquant.QuantizeOptions(overwrite=True)
    return llmquant.quantize(MODEL, folder / name, recipe, options).path


def evaluated(models: list[Path], report: Path) -> dict[str, Any]:
    """The report of `llmquant eval` on text that was not used for calibration."""
    text = f"file:{MODEL / 'heldout.txt'}"
    options = f"--window 512 --max-windows 8 --no-cost --reference {shlex.quote(str(MODEL))}"
    command = [sys.executable, "-m", "llmquant", "eval", *map(str, models), *shlex.split(options)]
    command += ["--text", text]
    subprocess.run([*command, "--output", str(report)], check=True)
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Two models, one report, one line for each model."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out/two-models")
    folder.mkdir(parents=True, exist_ok=True)
    text = {
        "calibration.source": f"file:{MODEL / 'calibration.txt'}",
        "calibration.nsamples": 16,
        "calibration.seqlen": 256,
    }
    models = [quantized(folder, "rtn-w4g128"), quantized(folder, "gptq-w4g128", text)]
    report = evaluated(models, folder / "report.json")
    for model in (m for m in report["models"] if m["role"] == "candidate"):
        kl, ratio = model["metrics"]["kl_mean"], model["metrics"]["perplexity_ratio"]
        print(
            f"{model['label']}: KL {kl['value']:.4f} ± {kl['standard_error']:.4f} nats, "
            f"perplexity ratio {ratio['value']:.4f} ± {ratio['standard_error']:.4f}"
        )


if __name__ == "__main__":
    main()
