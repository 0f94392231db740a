"""Choosing a token: every parameter against what it means, written out."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from llmquant_serve.engines.base import Sampling
from llmquant_serve.engines.sampling import Chooser, described, described_all

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0, 0.5])


def frequencies(sampling, count=4000, *, prompt=(), before=()):
    chooser = Chooser(sampling, prompt, frozenset())
    for token in before:
        chooser.update(token)
    drawn = Counter(chooser.choose(LOGITS) for _ in range(count))
    return [drawn[i] / count for i in range(len(LOGITS))]


def softmax(logits):
    return torch.softmax(torch.tensor(logits), -1).tolist()


GONE = -math.inf
TABLE = [
    pytest.param({"temperature": 1.0}, [2, 1, 0, -1, 3, 0.5], id="plain"),
    pytest.param({"temperature": 0.5}, [4, 2, 0, -2, 6, 1], id="temperature"),
    pytest.param({"top_k": 2}, [2, GONE, GONE, GONE, 3, GONE], id="top-k"),
    pytest.param(
        {"top_p": 0.8}, [2, GONE, GONE, GONE, 3, GONE], id="top-p keeps the token that crosses"
    ),
    pytest.param({"top_p": 0.0}, [GONE, GONE, GONE, GONE, 3, GONE], id="top-p 0 keeps the best"),
    pytest.param({"min_p": 0.3}, [2, GONE, GONE, GONE, 3, GONE], id="min-p"),
    pytest.param({"logit_bias": {0: -100.0, 2: 2.5}}, [-98, 1, 2.5, -1, 3, 0.5], id="bias"),
    pytest.param({"presence_penalty": 1.0}, [1, 1, 0, -1, 2, 0.5], id="presence, made 4 4 0"),
    pytest.param({"frequency_penalty": 1.0}, [1, 1, 0, -1, 1, 0.5], id="frequency, made 4 4 0"),
    pytest.param(
        {"repetition_penalty": 2.0}, [1, 1, 0, -2, 1.5, 0.5], id="repetition, prompt 3, made 4 4 0"
    ),
]


@pytest.mark.parametrize(("changes", "expected"), TABLE)
def test_draws_follow_the_distribution(changes, expected):
    """4000 draws; a frequency is then within 4 standard errors (0.032) of its probability, always,
    since the seed is fixed."""
    penalized = any("penalty" in k for k in changes)
    drawn = frequencies(
        Sampling(seed=0, **changes), prompt=(3,), before=(4, 4, 0) if penalized else ()
    )
    assert drawn == pytest.approx(softmax([float(x) for x in expected]), abs=0.032)


def test_a_draw_never_takes_what_was_left_out():
    drawn = frequencies(Sampling(seed=1, top_k=1))
    assert drawn == [0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize(
    "changes",
    [{}, {"logit_bias": {1: 5.0}}, {"presence_penalty": 2.0}],
    ids=["plain", "bias", "presence"],
)
def test_greedy_takes_the_first_of_the_largest(changes):
    tied = torch.tensor([0.0, 3.0, 3.0, 1.0])
    chooser = Chooser(Sampling(temperature=0.0, **changes), (), frozenset())
    assert chooser.greedy == (not changes)
    assert chooser.choose(tied) == 1


def test_end_tokens_are_held_back_until_min_tokens():
    chooser = Chooser(Sampling(temperature=0.0, min_tokens=2, stop_ids=(0,)), (), frozenset({4}))
    made = []
    for _ in range(3):
        made.append(chooser.choose(LOGITS))
        chooser.update(made[-1])
    assert made == [1, 1, 4]
    assert chooser.greedy


def test_the_logits_are_left_alone():
    before = LOGITS.clone()
    Chooser(Sampling(seed=0, logit_bias={0: 1.0}, top_k=2, top_p=0.5), (), frozenset()).choose(
        LOGITS
    )
    assert torch.equal(LOGITS, before)


def test_equal_seeds_draw_equally_and_none_draws_anew():
    def draws(seed):
        chooser = Chooser(Sampling(seed=seed), (), frozenset())
        return [chooser.choose(torch.zeros(1000)) for _ in range(8)]

    assert draws(5) == draws(5) != draws(6)
    assert draws(-5) == draws(-5)
    assert draws(None) != draws(None)


@pytest.mark.parametrize(
    "logits",
    [
        pytest.param(LOGITS.tolist(), id="several"),
        pytest.param([0.0] * 4096, id="all alike"),
        pytest.param([1.0, GONE, 2.0, GONE], id="some impossible"),
        pytest.param([GONE, 5.0, GONE], id="one"),
        pytest.param([1e4, -1e4, 0.0], id="far apart"),
    ],
)
def test_the_entropy_is_that_of_the_distribution(logits):
    top = max(logits)
    total = math.fsum(math.exp(x - top) for x in logits)
    shares = [math.exp(x - top) / total for x in logits]
    row = torch.tensor(logits)
    seen = described(1, row, 2, entropy=True)
    assert seen.entropy == pytest.approx(-math.fsum(p * math.log(p) for p in shares if p), abs=1e-5)
    assert (seen.logprob, seen.top) == (described(1, row, 2).logprob, described(1, row, 2).top)
    assert row.tolist() == torch.tensor(logits).tolist()


def test_described_tokens():
    expected = torch.log_softmax(LOGITS, -1)
    token = described(1, LOGITS, 2)
    assert token.logprob == float(expected[1])
    assert token.top == ((4, float(expected[4])), (0, float(expected[0])))
    assert described(1, LOGITS, None).logprob is None
    assert described(1, LOGITS, 0).top == ()
    assert len(described(1, LOGITS, 20).top) == 6
    rows = torch.randn(150, 6, generator=torch.Generator().manual_seed(0))
    tokens = [i % 6 for i in range(150)]
    assert described_all(tokens, rows, 3) == [
        described(t, row, 3) for t, row in zip(tokens, rows, strict=True)
    ]
