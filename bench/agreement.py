"""Whether the real vLLM and transformers compute what llmquant does with folders of real models.

    python bench/agreement.py FOLDER … --vllm-python .venv-vllm/bin/python

Prints for each folder the largest difference of the top-20 log-probabilities of a few prompts:
vLLM's at float16 from llmquant's at float16, and transformers' from llmquant's at float32. How
vLLM is run is ``tests/vllm/probe.py``, whose suite does this for every layout on small models.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import llmquant
from llmquant.models.from_folder import read_config
from llmquant.models.reading.tower import parts_beside

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "vllm"))
from probe import job_line  # noqa: E402

PROMPTS = (
    "The river runs through the town and",
    "In 1983 the team represented",
    "def fibonacci(n):\n    if n < 2:\n        return",
    "The album was released in",
    "What is the sum of 12 and 30?",
    "It was the best of times, it was the worst of",
)
TOP = 20
Told = list[dict[str, float]]
"""Per position of a prompt but the first, the log-probabilities of its likeliest tokens."""


def prompts_of(folder: Path) -> list[list[int]]:
    tokenizer = llmquant.load_tokenizer(folder)
    return [tokenizer(text)["input_ids"] for text in PROMPTS]


def in_vllm(folders: list[Path], python: str, scratch: Path) -> dict[Path, list[Told] | str]:
    """What vLLM says of each folder; the end of what it printed where it does not run it."""
    ends = [(scratch / f"{i}.json", scratch / f"{i}.log") for i in range(len(folders))]
    lines = [
        job_line(
            folder,
            "float16",
            prompts_of(folder),
            result=result,
            log=log,
            seconds=600,
            sees=bool(parts_beside(read_config(folder))),
        )
        for folder, (result, log) in zip(folders, ends, strict=True)
    ]
    probe = [python, str(ROOT / "tests" / "vllm" / "probe.py"), "as-it-is"]
    subprocess.run(
        probe, input="".join(lines), text=True, check=True, stdout=subprocess.DEVNULL,
        env={k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OMP_NUM_THREADS")},
    )  # fmt: skip
    found: dict[Path, list[Told] | str] = {}
    for folder, (result, log) in zip(folders, ends, strict=True):
        found[folder] = (
            json.loads(result.read_text()) if result.exists() else log.read_text()[-500:]
        )
    return found


def log_probabilities(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), -1)


def differences(told: list[Told], model: Any, prompts: list[list[int]]) -> str:
    """The largest difference, and how often the first choice is the same."""
    worst, same, positions = 0.0, 0, 0
    for ids, answer in zip(prompts, told, strict=True):
        own = log_probabilities(model, ids)
        for position, tops in enumerate(answer):
            worst = max(worst, *(abs(v - float(own[position, int(k)])) for k, v in tops.items()))
            same += int(max(tops, key=lambda k: tops[k])) == int(own[position].argmax())
            positions += 1
    return f"{worst:.4f}, first choice {same} of {positions}"


def of_transformers(folder: Path, prompts: list[list[int]]) -> list[Told]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for ids in prompts:
        values, tokens = log_probabilities(model, ids)[:-1].topk(TOP)
        pairs = zip(tokens.tolist(), values.tolist(), strict=True)
        found.append([{str(t): v for t, v in zip(*row, strict=True)} for row in pairs])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--vllm-python", required=True, help="python of vLLM's environment")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        told = in_vllm(args.folders, args.vllm_python, Path(scratch))
    for folder in args.folders:
        prompts, answer = prompts_of(folder), told[folder]
        half = llmquant.load(folder, dtype=torch.float16)
        vllm = answer if isinstance(answer, str) else differences(answer, half, prompts)
        print(folder.name, "vllm:", vllm, flush=True)
        try:
            theirs = of_transformers(folder, prompts)
        except (ImportError, RuntimeError, ValueError) as e:
            print(folder.name, "transformers: refused,", e, flush=True)
            continue
        whole = llmquant.load(folder, dtype=torch.float32)
        print(folder.name, "transformers:", differences(theirs, whole, prompts), flush=True)


if __name__ == "__main__":
    main()
