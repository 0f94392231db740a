"""How many threads torch computes with: ``--threads`` of every command that computes.

Results depend on it in the last bits, because sums are split among threads, so runs record it. More
threads than this process may run at once are slower and still allowed: they repeat, bit for bit, a
run of a larger machine. A warning says so.
"""

from __future__ import annotations

import sys

import torch

from llmquant.errors import UsageError
from llmquant.runtime.processor import this_processor


def set_threads(threads: int | None = None) -> int:
    """Compute with so many threads; None leaves what torch has. Returns how many it is.

    Raises:
        UsageError: fewer than 1.
    """
    if threads is None:
        return torch.get_num_threads()
    if threads < 1:
        raise UsageError(f"--threads {threads}: give 1 or more, or leave it out")
    available = this_processor().threads
    if threads > available:
        sys.stderr.write(
            f"warning: --threads {threads} is more than the {available} that this process may run at once: slower, "
            "but as a larger machine computes\n"
        )
    torch.set_num_threads(threads)
    return threads
