"""KL over the full vocabulary: exact in fp64 on a small one, sound where probabilities vanish."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

import llmquant_eval.scoring.perplexity as perplexity_module
from llmquant.errors import QuantizationError
from llmquant_eval.report.statistics import Floats
from llmquant_eval.scoring.buckets import breakdowns, context_edges
from llmquant_eval.scoring.divergence import Divergence, token_divergence
from llmquant_eval.scoring.layout import Layout
from llmquant_eval.scoring.protocols import GptqProtocol

POSITIONS, VOCABULARY = 60, 37


def divergence_of(kl: Floats, same_top: Floats | None = None, delta_p: Floats | None = None,
                  confidence: Floats | None = None, windows: int = 2) -> Divergence:  # fmt: skip
    """A Divergence of flat arrays over ``windows`` windows of equal length; what is left out is
    zero."""
    nothing = np.zeros_like(kl)
    parts = [nothing if part is None else part for part in (same_top, delta_p, confidence)]
    return Divergence(kl, *parts, layout=Layout(np.full(windows, len(kl) // windows)), label="m")


def logits(seed: int, scale: float = 3.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (
        scale * torch.randn(POSITIONS, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    ).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("nearness", [1.0, 1e-2], ids=["far", "near"])
def test_against_scipy_in_fp64(dtype: torch.dtype, nearness: float) -> None:
    p_logits = logits(0, dtype=dtype)
    q_logits = (p_logits.float() + nearness * logits(1)).to(dtype)
    targets = torch.randint(0, VOCABULARY, (POSITIONS,), generator=torch.Generator().manual_seed(2))
    p, q = (softmax(t.double().numpy(), axis=1) for t in (p_logits, q_logits))
    rows = np.arange(POSITIONS)
    got = token_divergence(p_logits, q_logits, targets)
    assert got.kl.dtype == torch.float32
    np.testing.assert_allclose(got.kl.numpy(), rel_entr(p, q).sum(axis=1), rtol=2e-5, atol=3e-7)
    np.testing.assert_allclose(got.delta_p.numpy(), q[rows, targets] - p[rows, targets], atol=3e-7)
    np.testing.assert_allclose(got.confidence.numpy(), p.max(axis=1), rtol=2e-6)
    assert got.same_top.tolist() == (p_logits.argmax(1) == q_logits.argmax(1)).tolist()


def test_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    got = token_divergence(p, q, torch.tensor([1]))
    assert got.kl.item() == pytest.approx(0.25 * math.log(2), rel=1e-6)
    assert got.delta_p.item() == pytest.approx(0.25, rel=1e-6)
    assert got.same_top.tolist() == [False]


def test_the_direction_is_reference_to_candidate() -> None:
    p, q = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    forward = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    assert token_divergence(p, q, torch.tensor([0])).kl.item() == pytest.approx(forward, rel=1e-6)


@pytest.mark.parametrize(
    ("p", "q", "kl"),
    [
        pytest.param(
            [0.0, math.log(0.5), math.log(0.5)], [0.0, 0.0, 0.0], None, id="both possible"
        ),
        pytest.param([-math.inf, 0.0, 0.0], [0.0, 0.0, 0.0], math.log(1.5), id="p=0 adds nothing"),
        pytest.param([-math.inf, 0.0, 0.0], [-math.inf, 0.0, 0.0], 0.0, id="p=q=0 adds nothing"),
        pytest.param(
            [0.0, 0.0, 0.0], [-math.inf, 0.0, 0.0], math.inf, id="q=0 where p>0 is infinite"
        ),
    ],
)
def test_vanishing_probabilities(p: list[float], q: list[float], kl: float | None) -> None:
    got = token_divergence(torch.tensor([p]), torch.tensor([q]), torch.tensor([1])).kl.item()
    expected = float(rel_entr(softmax(p), softmax(q)).sum()) if kl is None else kl
    assert got == pytest.approx(expected, rel=1e-6)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, targets = (logits(0), logits(1)), torch.arange(POSITIONS) % VOCABULARY
    whole = token_divergence(*pair, targets)
    monkeypatch.setattr(perplexity_module, "CHUNK_ELEMENTS", 7 * VOCABULARY)
    parts = token_divergence(*pair, targets)
    assert torch.equal(whole.kl, parts.kl)
    assert torch.equal(whole.same_top, parts.same_top)
    assert torch.equal(whole.delta_p, parts.delta_p)


def test_the_inputs_are_left_as_they_were() -> None:
    p, q = logits(0), logits(1)
    before = p.clone(), q.clone()
    token_divergence(p, q, torch.arange(POSITIONS) % VOCABULARY)
    assert torch.equal(p, before[0])
    assert torch.equal(q, before[1])


def test_infinite_tokens_are_counted_and_left_out() -> None:
    divergence = divergence_of(
        np.array([0.1, 0.3, math.inf, 0.2]),
        np.array([1.0, 1.0, 1.0, 0.0]),
        np.array([0.3, 0.0, 9.0, 0.4]),
    )
    assert (divergence.tokens, divergence.excluded) == (3, 1)
    assert divergence.mean_kl.value == pytest.approx(0.2)
    assert divergence.top1_agreement.value == pytest.approx(2 / 3)
    assert divergence.rms_delta_p.value == pytest.approx(math.sqrt(0.25 / 3))
    assert divergence.max_kl == 0.3
    assert divergence.quantiles()[0.5] == pytest.approx(0.2)


def test_nothing_finite_is_an_error() -> None:
    with pytest.raises(QuantizationError, match="m: its divergence"):
        divergence_of(np.full(4, math.nan))


def test_quantiles_interpolate_between_order_statistics() -> None:
    divergence = divergence_of(np.arange(1001, dtype=np.float64)[::-1], windows=1)
    assert divergence.quantiles() == pytest.approx(
        {0.5: 500.0, 0.9: 900.0, 0.99: 990.0, 0.999: 999.0}
    )


@pytest.mark.parametrize(
    ("longest", "edges"), [(3, (1, 16)), (15, (1, 16)), (16, (1, 16, 32)), (63, (1, 16, 32, 64))]
)
def test_context_edges_are_powers_of_two(longest: int, edges: tuple[int, ...]) -> None:
    assert context_edges(longest) == edges


def test_buckets_divide_the_positions_and_their_means() -> None:
    windows = GptqProtocol(41).windows(41 * 25)
    tokens = 40 * 25
    draw = np.random.default_rng(0)
    kl, confidence = draw.exponential(1.0, tokens), draw.uniform(0, 1, tokens)
    kl[7], confidence[:3] = math.inf, (0.0, 0.1, 1.0)
    agreement = (draw.uniform(size=tokens) < 0.5).astype(np.float64)
    divergence = divergence_of(kl, agreement, confidence=confidence, windows=25)
    by_confidence, by_context = breakdowns(divergence, windows, "kl/top-41")
    contexts = np.tile(np.arange(1, 41), 25)
    for found, values in ((by_confidence, confidence), (by_context, contexts)):
        assert sum(b.tokens for b in found.buckets) == tokens - 1
        for bucket in found.buckets:
            last = bucket is found.buckets[-1]
            inside = (values >= bucket.lower) & (
                (values < bucket.upper) | (last & (values == bucket.upper))
            )
            inside &= np.isfinite(kl)
            assert bucket.tokens == inside.sum()
            assert bucket.kl_mean == pytest.approx(kl[inside].mean(), rel=1e-12)
            assert bucket.top1_agreement == pytest.approx(agreement[inside].mean(), rel=1e-12)
            assert bucket.standard_error is not None
            assert bucket.standard_error == pytest.approx(
                kl[inside].std() / math.sqrt(bucket.tokens), rel=0.5
            )
    assert [(b.lower, b.upper) for b in by_context.buckets] == [(1, 16), (16, 32), (32, 64)]
    assert len(by_confidence.buckets) == 10


def test_a_bucket_without_tokens_is_left_out() -> None:
    divergence = divergence_of(
        np.ones(6), confidence=np.array([0.95, 0.91, 0.05, 0.95, 0.91, 0.05])
    )
    by_confidence, _ = breakdowns(divergence, GptqProtocol(4).windows(8), "kl/top-4")
    assert [(b.lower, b.upper, b.tokens) for b in by_confidence.buckets] == [
        (0.0, 0.1, 2),
        (0.9, 1.0, 4),
    ]
