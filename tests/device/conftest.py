"""The device is registered when the first test of this folder runs, and not when tests are
collected: in a process that has it, other tests find another torch."""

from __future__ import annotations

import pytest
from pretend_device import install


@pytest.fixture(scope="session", autouse=True)
def device() -> None:
    install()
