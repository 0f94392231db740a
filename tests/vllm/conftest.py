"""Lists at the end which rows of the engine table this machine's CPU could not be asked about: they
are not tested here."""

from __future__ import annotations

from collections import defaultdict

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    left: dict[str, list[str]] = defaultdict(list)
    for report in terminalreporter.stats.get("skipped", []):
        for name, value in report.user_properties:
            if name == "not run":
                engine, _, row = value.partition(": ")
                left[engine].append(row)
    for engine, rows in left.items():
        terminalreporter.section(f"not run: {len(rows)} rows of {engine}", yellow=True)
        terminalreporter.write_line(", ".join(rows))
