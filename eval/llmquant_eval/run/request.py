"""What ``llmquant eval`` was asked for: the command line as a value that can write itself back as
one, so that a Report carries the line that repeats it.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, fields
from pathlib import Path

import llmquant
from llmquant.errors import UsageError
from llmquant_eval.models.endpoint import is_url
from llmquant_eval.scoring.protocols import has_window

DEFAULT_PROTOCOL = "ppl/gptq"
BOS = ("default", "each-window")
"""Where a BOS token stands: where the tokenizer puts one in the text, or before every window."""


@dataclass(frozen=True, slots=True)
class Request:
    """What ``llmquant eval`` was asked for; the fields are its options. Lists are written with
    commas."""

    candidates: tuple[str, ...]
    text: str | None = None
    reference: str | None = None
    protocol: str | None = None
    window: int | None = None
    bos: str = "default"
    max_windows: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    kernel: str = "auto"
    threads: int | None = None
    batch_size: int | None = None
    tokenizer: str | None = None
    cache: str | None = None
    cache_form: str | None = None
    tasks: str | None = None
    include_path: str | None = None
    limit: int | None = None
    log_samples: str | None = None
    retry_for: float | None = None
    cost: bool = True
    noise_floor: bool = True

    def __post_init__(self) -> None:
        if not self.candidates:
            raise UsageError("name at least one model to evaluate")
        if self.text is None and self.tasks is None:
            raise UsageError("there is nothing to measure; give --text, --tasks or both")
        if self.text is None and self.protocol is not None:
            raise UsageError(f"--protocol {self.protocol} needs a text; give --text")
        if self.bos not in BOS:
            raise UsageError(f"--bos {self.bos} is not known; give {' or '.join(BOS)}")
        if self.bos != BOS[0] and self.text is None:
            raise UsageError(f"--bos {self.bos} needs a text; give --text")
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"--batch-size {self.batch_size} is too small; give 1 or more")
        if (
            self.window is not None
            and self.protocol is not None
            and all(map(has_window, self.protocols))
        ):
            raise UsageError("--protocol and --window both set the window; give one of them")
        if self.cache_form is not None and self.cache is None:
            raise UsageError("--cache-form says how a cache is written; give --cache DIR with it")
        if self.cache is not None and self.reference is None and not self.served:
            raise UsageError(
                "--cache keeps the reference's distributions; name the reference with --reference"
            )
        if self.retry_for is not None and not 0 <= self.retry_for < math.inf:
            raise UsageError(
                f"--retry-for {self.retry_for} is no time; give seconds, 0 to ask a server only once"
            )
        if self.retry_for is not None and not self.served:
            raise UsageError("--retry-for is for served models; leave it out")
        if self.tasks is None and (self.limit, self.include_path, self.log_samples) != (
            None,
            None,
            None,
        ):
            raise UsageError(
                "--limit, --include-path and --log-samples belong to --tasks; give --tasks with them"
            )

    @property
    def served(self) -> bool:
        """Whether a model is a server."""
        return any(map(is_url, self.candidates))

    @property
    def kept(self) -> Path:
        """The folder of what an unfinished run leaves."""
        return llmquant.user_cache("eval") if self.cache is None else Path(self.cache)

    @property
    def bos_each(self) -> bool:
        return self.bos == "each-window"

    @property
    def protocols(self) -> tuple[str, ...]:
        """Protocols as they were written, in order; none where there is no text."""
        if self.text is None:
            return ()
        return tuple(filter(None, (self.protocol or DEFAULT_PROTOCOL).split(",")))

    def command(self) -> str:
        """The command line that repeats this run; options that stand at their default are left
        out."""
        words = ["llmquant", "eval", *self.candidates]
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name == "candidates" or value == option.default:
                continue
            name = option.name.replace("_", "-")
            words += [f"--no-{name}"] if value is False else [f"--{name}", str(value)]
        return shlex.join(words)
