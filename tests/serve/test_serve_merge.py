"""Several generators as one: nothing is lost, an error comes after what came before it, closing
closes all."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from llmquant_serve.chat.visitors import Runs
from llmquant_serve.generation.merge import merged


class Source:
    """Yields its items, then raises ``error`` if there is one; knows whether it was closed."""

    def __init__(self, items, error=None, pause=0.0):
        self.items, self.error, self.pause = items, error, pause
        self.taken, self.closed = 0, False

    async def run(self):
        try:
            for item in self.items:
                self.taken += 1
                yield item
                await asyncio.sleep(self.pause)
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True


async def drained(generator):
    """All items, and the error that ended them."""
    items = []
    try:
        async for item in generator:
            items.append(item)
    except ValueError as e:
        return items, e
    return items, None


def test_every_item_arrives_in_its_generators_order():
    sources = [Source(range(50)), Source([]), Source(range(100, 130))]
    items, error = asyncio.run(drained(merged([s.run() for s in sources])))
    assert error is None
    assert len(items) == 80
    for index, source in enumerate(sources):
        assert [item for i, item in items if i == index] == list(source.items)
        assert source.closed


def test_an_error_comes_after_the_items_before_it_and_closes_the_others():
    failing, endless = Source([1, 2], ValueError("broken")), Source(range(10**6), pause=0.01)
    items, error = asyncio.run(drained(merged([failing.run(), endless.run()])))
    assert str(error) == "broken"
    assert [item for i, item in items if i == 0] == [1, 2]
    assert endless.closed


def test_a_reader_that_stops_closes_all_and_none_runs_far_ahead():
    sources = [Source(range(1000)), Source(range(1000))]

    async def main():
        async with aclosing(merged([s.run() for s in sources])) as items:
            await anext(items)
            await asyncio.sleep(0.05)

    asyncio.run(main())
    assert all(s.closed for s in sources)
    assert sum(s.taken for s in sources) < 30


@pytest.mark.parametrize("error", [None, ValueError("broken")], ids=["ends", "fails"])
def test_a_visitor_sees_the_last_item_and_the_error(error):
    items, seen = asyncio.run(drained(Runs().follow("anna", Source([1, 2, 3], error).run())))
    assert items[-1] == 3
    assert seen is error


def test_what_a_visitor_stops_ends_without_an_error():
    source, runs = Source(range(10**6), pause=0.01), Runs()

    seen = []

    def stop():
        seen.append(runs.running("anna"))
        runs.stop("anna")
        seen.append(runs.running("anna"))

    async def main():
        asyncio.get_running_loop().call_later(0.25, stop)
        return await drained(runs.follow("anna", source.run()))

    items, error = asyncio.run(main())
    assert items
    assert error is None
    assert seen == [True, False]
    assert source.closed
