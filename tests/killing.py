"""Runs quantizations in forked children and kills them where it is told: a process of its own, so
that forking is safe.

Reads one job per line (JSON) from stdin and answers each with a line. An *instant* is a call of the
operating system that changes the disk; instants are counted, so that ``kill: 7`` stops at the same
place every time, before or behind the seventh of them. ``count`` only tells how many there are.
``after_seconds`` kills at a moment that nothing chose.
"""

from __future__ import annotations

import gc
import io
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from llmquant.quantization.options import QuantizeOptions
from llmquant.quantization.run import quantize
from llmquant.recipe import Recipe

CALLS = {"write", "fsync", "rename", "truncate", "unlink", "sendfile", "mkdir", "rmdir", "flock"}


class Instants:
    """Counts them from the lock on the unfinished folder on, and kills this process at one."""

    def __init__(self, kill: int | None, behind: bool) -> None:
        self.count, self._kill = 0, kill
        # A call that fails (a folder that is there already) has an end too.
        self._events = ("c_return", "c_exception") if behind else ("c_call",)

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        if (
            event not in ("c_call", "c_return", "c_exception")
            or getattr(arg, "__name__", "") not in CALLS
        ):
            return
        if (self.count == 0 and arg.__name__ != "flock") or isinstance(arg.__self__, io.StringIO):
            return
        self.count += event == "c_call"
        if self.count == self._kill and event in self._events:
            os.kill(os.getpid(), signal.SIGKILL)


def child(job: dict[str, Any], answer: Path) -> None:
    if (
        "file_limit" in job
    ):  # the kernel then writes what fits and refuses the rest, as a full disk does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # which may be a file too
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], resource.RLIM_INFINITY))
    instants = Instants(job.get("kill"), job.get("behind", False))
    options = QuantizeOptions(
        max_shard_size=job["max_shard_size"], max_memory=job.get("max_memory")
    )
    told: dict[str, Any] = {}
    if job.get("kill") or job.get("count"):
        sys.setprofile(instants)
    try:
        told["resumed"] = quantize(
            job["model"], job["output"], Recipe.model_validate(job["recipe"]), options
        ).resumed
    except Exception as e:  # noqa: BLE001 - whatever it was, the test that asked tells of it
        told["error"] = f"{type(e).__name__}: {e}"
    finally:
        sys.setprofile(None)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    answer.parent.mkdir(exist_ok=True)  # a run that keeps nothing has removed it
    answer.write_text(json.dumps({**told, "instants": instants.count}), encoding="utf-8")


def run(job: dict[str, Any]) -> dict[str, Any]:
    answer = Path(job["output"] + ".answer")
    answer.unlink(missing_ok=True)
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            child(job, answer)
        finally:
            os._exit(0)
    if "after_seconds" in job:
        time.sleep(random.uniform(0, job["after_seconds"]))
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    told = json.loads(answer.read_text(encoding="utf-8")) if answer.is_file() else {}
    answer.unlink(missing_ok=True)
    return {"killed": killed, "seconds": time.monotonic() - started, **told}


def main() -> None:
    gc.freeze()  # children need not look through everything that was imported
    for line in sys.stdin:
        sys.stdout.write(json.dumps(run(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
