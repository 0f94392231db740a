"""Short training runs: the section that tests begin with, and runs in several processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmquant.training.options import QatResult

SHORT: dict[str, Any] = {
    "steps": 6, "batch_size": 4, "micro_batch": 2, "seqlen": 32, "heldout": 4, "checks": 3,
    "lr": 0.01, "codes_lr": 0.02, "lora_lr": 0.01, "rank": 4, "top_k": 32,
}  # fmt: skip
Train = Callable[..., QatResult]

SHARED = """
import json, sys
from pathlib import Path
from llmquant.recipe_sections import QAT
from llmquant.training.run import qat
job = json.loads(sys.argv[1])
done = qat(job["start"], job["output"], QAT.model_validate(job["section"]), reference=job["model"])
print("AFTER", done.record.after)
"""


def in_two_processes(
    folder: Path, start: Path, model: Path, section: dict[str, Any]
) -> subprocess.CompletedProcess[str]:
    """Train into ``folder / "out"``; each process prints the held-out KL after ``AFTER``."""
    job = {"start": str(start), "output": str(folder / "out"), "model": str(model)}
    (folder / "run.py").write_text(SHARED)
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(folder / "run.py")),
            json.dumps({**job, "section": section}),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
