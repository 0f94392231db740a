"""The device is registered when the first test of this folder runs, and not when tests are
collected: in a process that has it, other tests find another torch."""

from __future__ import annotations

import pytest
from pretend_device import install


@pytest.fixture(scope="session", autouse=True)
def device(request: pytest.FixtureRequest) -> None:
    others = [i.nodeid for i in request.session.items if i.get_closest_marker("device") is None]
    if others:
        pytest.fail(
            f"tests on the pretend device run by themselves (pytest -m device tests/device), not with {others[0]}"
        )
    install()
