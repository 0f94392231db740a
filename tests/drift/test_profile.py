"""What is kept of a request and of many, and what is refused."""

from __future__ import annotations

import json

import pytest
from streams import TOKENIZER

from llmquant.drift.observation import BUCKETS, DriftObservation, observe_request
from llmquant.drift.profile import (
    DriftProfile,
    Ruler,
    load_drift_profile,
    make_drift_profile,
)
from llmquant.errors import UsageError

FEWEST = DriftProfile.FEWEST


def request(text: str = "Yes.", **more: object) -> DriftObservation:
    return observe_request([5, 6, 6], [7, 8], text, **{"ended": True, **more})


def test_a_request_is_kept_as_numbers():
    seen = request(logprobs=[-1.0, -2.0], entropies=[0.5, 1.5])
    assert (seen.prompt_length, seen.answer_length, seen.logprob, seen.entropy) == (3, 2, -1.5, 1.0)
    assert sorted(seen.prompt_words.values()) == [1, 2]
    assert DriftObservation.model_validate_json(seen.model_dump_json()) == seen


def test_neighbouring_ids_have_buckets_of_their_own():
    words = observe_request(range(BUCKETS), [1], "", ended=True).prompt_words
    assert len(words) > 0.8 * BUCKETS


@pytest.mark.parametrize(
    ("text", "refused", "valid"),
    [
        pytest.param("I'm sorry, but I can't help with that.", True, None, id="a refusal"),
        pytest.param("<think>I can't help.</think>\nParis.", False, None, id="thoughts"),
        pytest.param("<think>[I", False, None, id="thoughts without end"),
        pytest.param("Paris.", False, None, id="an answer"),
        pytest.param('{"a": 1}', False, True, id="JSON"),
        pytest.param("```json\n[1, 2]\n```", False, True, id="JSON in a fence"),
        pytest.param('{"a": 1', False, False, id="JSON cut off"),
    ],
)
def test_flags_of_an_answer(text, refused, valid):
    assert (request(text).refused, request(text).json_valid) == (refused, valid)


def test_a_half_fixes_the_bins_and_the_other_is_counted(tmp_path):
    profile = make_drift_profile([request(logprobs=[-i / 100]) for i in range(100)], "m", TOKENIZER)
    assert profile.requests == 100
    assert {sum(h.counts) for h in profile.statistics.values()} == {50}
    assert sum(profile.prompt_words) == 50 * 3
    assert set(profile.statistics) == {
        *("prompt_length", "prompt_words", "prompt_variety"),
        *("answer_length", "answer_words", "answer_variety"),
        *("logprob", "ended", "refused"),
    }
    path = tmp_path / "profile.json"
    path.write_text(profile.to_json(), encoding="utf-8")
    assert load_drift_profile(path) == load_drift_profile(str(path)) == profile


def test_words_that_are_usual_overlap():
    ruler = Ruler([100] + [0] * (BUCKETS - 1), [1] * BUCKETS)
    usual, rare = (
        ruler.numbers(DriftObservation(prompt_length=1, prompt_words={bucket: 1}))["prompt_words"]
        for bucket in (0, 1)
    )
    assert (usual, rare) == (1, 0)


def test_too_few_answers_are_no_profile():
    with pytest.raises(UsageError, match=f"needs {FEWEST} answers or more, and there are 39"):
        make_drift_profile([request()] * 39, "m", TOKENIZER)


def changed(change: dict[str, object]) -> str:
    profile = make_drift_profile([request()] * FEWEST, "m", TOKENIZER)
    return json.dumps(json.loads(profile.to_json()) | change)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        pytest.param(None, "cannot be read", id="no file"),
        pytest.param("", "is not a drift profile", id="empty"),
        pytest.param("[1]", "is not a drift profile", id="a list"),
        pytest.param(changed({"schema_version": 2}), "schema_version", id="another version"),
        pytest.param(changed({"prompt_words": [1]}), "prompt_words", id="a short sketch"),
        pytest.param(
            changed({"statistics": {"mood": {"edges": [], "counts": [1], "mean": 1}}}),
            "there is no statistic mood",
            id="an unknown statistic",
        ),
        pytest.param(
            changed({"statistics": {"ended": {"edges": [1, 1], "counts": [1, 1, 1], "mean": 1}}}),
            "edges must ascend",
            id="edges that do not ascend",
        ),
        pytest.param(
            changed(
                {"statistics": {"ended": {"edges": [float("nan")], "counts": [1, 1], "mean": 1}}}
            ),
            "edges.0: .* finite",
            id="an edge that is no number",
        ),
        pytest.param(
            changed({"statistics": {"ended": {"edges": [0], "counts": [10**400, 1], "mean": 1}}}),
            "counts.0: .* less than",
            id="a count that no float holds",
        ),
        pytest.param(
            changed({"prompt_words": [-5] + [1] * (BUCKETS - 1)}),
            "prompt_words.0: .* greater than",
            id="a bucket with fewer than none",
        ),
    ],
)
def test_what_is_no_profile_is_refused(tmp_path, content, why):
    path = tmp_path / "profile.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=why):
        load_drift_profile(path)
    assert isinstance(DriftProfile.model_validate_json(changed({})), DriftProfile)
