"""Run by the vLLM environment's Python: prompt log-probabilities of models in the real vLLM.

    python probe.py HELD < jobs

``HELD`` is ``as-it-is``, or ``no-avx512``: vLLM then takes the library of kernels that it has for a
CPU without AVX-512, which it chooses by asking torch what the CPU has. On such a CPU the two are
the same.

Importing vLLM takes longer than judging a model, so it is imported once. Each job (a line of JSON:
folder, dtype, prompts, whether the model sees, where to put the result and what it printed, and how
many seconds it may take) runs in a fork, a process of its own, since an engine that failed leaves a
process of no use.
The answer is a line with the fork's exit code, negative where a signal ended it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any


def own_core() -> int:
    """Another one for each worker of a parallel run."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % len(cores)]


ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # One core: models are tiny, and threads that wait for each other wait long when anything else
    # runs here.
    "VLLM_CPU_OMP_THREADS_BIND": str(own_core()),
}
KEPT: list[Any] = []  # libraries of operators, which are gone with their objects


def main() -> None:
    os.environ |= ENVIRONMENT
    if sys.argv[1] == "no-avx512":
        import torch

        torch.cpu._is_avx512_supported = torch.cpu._is_avx512_bf16_supported = lambda: False
    add_torchvision()
    from vllm import LLM, SamplingParams  # noqa: F401 - for the forks

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        answers.write(f"{forked(json.loads(line))}\n")
        answers.flush()


def add_torchvision() -> None:
    """vLLM's models with eyes import torchvision. PyPI's build of it is for CUDA; without CUDA its
    compiled operators are not there, and the import asks for these two. So it lies in a folder of
    its own (``make vllm-env``), where vLLM's server does not find it."""
    import torch

    sys.path.append(str(Path(sys.prefix, "torchvision")))
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    KEPT.append(library)


def job_line(
    folder: Path,
    dtype: str,
    prompts: list[list[int]],
    *,
    result: Path,
    log: Path,
    seconds: int,
    sees: bool = False,
) -> str:
    """A job, as this script reads it."""
    job = {"folder": str(folder), "dtype": dtype, "prompts": prompts, "sees": sees}
    ends = {"result": str(result), "log": str(log), "seconds": seconds}
    return json.dumps(job | ends) + "\n"


def forked(job: dict[str, Any]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sink = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            signal.alarm(job["seconds"])
            judge(job)
            code = 0
        except Exception:  # noqa: BLE001 - whatever it was, the test that asked tells of it
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def judge(job: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams

    # Models with eyes are asked about text; these have no files for images.
    alone = {"language_model_only": True} if job["sees"] else {}
    engine = LLM(job["folder"], dtype=job["dtype"], enforce_eager=True, max_model_len=512, **alone)
    asked = SamplingParams(max_tokens=1, prompt_logprobs=20, temperature=0.0)
    results = engine.generate(
        [{"prompt_token_ids": ids} for ids in job["prompts"]], asked, use_tqdm=False
    )
    told = [
        [{str(k): v.logprob for k, v in position.items()} for position in r.prompt_logprobs[1:]]
        for r in results
    ]
    Path(job["result"]).write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main()
