"""Streams of real requests: false alarms are no more than stated, shifts are found and named."""

from __future__ import annotations

import statistics

import pytest
from streams import first_alarm, split

from llmquant.drift.monitor import DriftMonitor, DriftState
from llmquant.drift.observation import DriftObservation
from llmquant.errors import UsageError

STREAMS, SAMPLE = 200, 160
ALPHA = 0.1  # ten times the default: so that a monitor which keeps no promise is seen to break it


def test_streams_without_a_shift_raise_no_more_alarms_than_stated(pools):
    alarms = 0
    for seed in range(STREAMS):
        profile, stream = split(pools["same"], seed, SAMPLE)
        alarms += first_alarm(DriftMonitor(profile, ALPHA), stream) is not None
    assert alarms <= ALPHA * STREAMS


@pytest.mark.parametrize(
    ("shift", "cause", "most"),
    [
        pytest.param("domain", "prompts", 60, id="prompts of another domain"),
        pytest.param("damaged", "model", 60, id="damaged scales"),
    ],
)
def test_a_shift_is_found_and_named(pools, shift, cause, most):
    waits, causes = [], []
    for seed in range(20):
        profile, quiet = split(pools["same"], seed, SAMPLE)
        monitor = DriftMonitor(profile)
        assert first_alarm(monitor, quiet[:100]) is None
        _, shifted = split(pools[shift], seed, 40)
        waits.append(first_alarm(monitor, shifted) or 10**6)
        causes.append(monitor.cause)
    assert statistics.median(waits) <= most / 2
    assert max(waits) <= most
    assert set(causes) <= {cause, "undecided"}
    assert causes.count(cause) >= 15, causes


def test_it_goes_on_where_it_was(pools):
    profile, stream = split(pools["same"], 0, SAMPLE)
    whole, first, second = (DriftMonitor(profile, window=20) for _ in range(3))
    for seen in stream[:70]:
        first.add(seen)
    second.restore(DriftState.model_validate_json(first.state().model_dump_json()))
    for seen in stream[:130]:
        whole.add(seen)
    for seen in stream[70:130]:
        second.add(seen)
    assert second.report() == whole.report()
    assert second.state() == whole.state()
    assert [window.last for window in whole.report().windows] == [20, 40, 60, 80, 100, 120]


def test_an_alarm_is_raised_once(pools):
    profile, _ = split(pools["same"], 0, SAMPLE)
    monitor = DriftMonitor(profile)
    raised = [alarm.statistic for seen in pools["domain"][:150] for alarm in monitor.add(seen)]
    assert "prompt_words" in raised
    assert len(raised) == len(set(raised)) == len(monitor.report().alarms)


GAP = DriftObservation(gap=0.05)
WORSE = DriftObservation(gap=0.4)


def test_the_distance_from_the_original_tells_the_model_from_the_prompts(pools):
    profile, _ = split([*pools["same"]], 0, SAMPLE)
    monitor = DriftMonitor(profile)
    for _ in range(60):
        assert not monitor.add(GAP)
    waits = first_alarm(monitor, [WORSE] * 60)
    assert waits is not None
    assert (monitor.cause, monitor.requests, monitor.entries) == ("model", 0, 60 + waits)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -1.0, float("nan")], ids=str)
def test_alpha_is_a_probability(pools, alpha):
    profile, _ = split(pools["same"], 0, SAMPLE)
    with pytest.raises(UsageError, match="must be between 0 and 1"):
        DriftMonitor(profile, alpha)
