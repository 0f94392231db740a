"""What ``llmquant serve`` is asked to do about drift."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmquant_serve.drift.hooks import Hooks
from llmquant_serve.drift.log import DriftLog


@dataclass(frozen=True, slots=True)
class DriftOptions:
    """Of ``llmquant serve --drift``.

    Attributes:
        log: None is beside the profile.
        sample: the fraction of answers that the original scores.
    """

    profile: Path
    log: Path | None
    alpha: float
    hooks: Hooks
    sample: float = 0.0

    def opened(self) -> DriftLog:
        """The log, continued if it is there.

        Raises:
            UsageError: profile or log cannot be used.
        """
        from llmquant import load_drift_profile

        path = self.log or self.profile.with_name(f"{self.profile.stem}.log.jsonl")
        return DriftLog(path, load_drift_profile(self.profile), self.alpha)
