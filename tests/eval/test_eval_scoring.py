"""The one pass: equal to the slow obvious loop, whatever the batch and the chunk; NaN is an
error."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import long_rope
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import llmquant_eval.scoring.perplexity as perplexity_module
from llmquant.errors import QuantizationError, UsageError
from llmquant_eval.scoring.batches import batches
from llmquant_eval.scoring.perplexity import position_chunks, token_nll
from llmquant_eval.scoring.protocols import (
    GptqProtocol,
    StridedProtocol,
    TokenWindow,
    WindowProtocol,
)
from llmquant_eval.scoring.score_models import score_models
from llmquant_eval.scoring.token_stream import TokenStream

VOCABULARY, WINDOW = 50, 16


def random_llama(
    seed: int, vocabulary: int = VOCABULARY, dtype: torch.dtype = torch.float32
) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture(scope="module")
def reference() -> Any:
    return random_llama(0)


@pytest.fixture(scope="module")
def candidate() -> Any:
    return random_llama(1)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(
        0, VOCABULARY, (7 * WINDOW + 5,), generator=torch.Generator().manual_seed(2)
    )


def stream_of(ids: Tensor, protocol: WindowProtocol | None = None) -> TokenStream:
    protocol = protocol or GptqProtocol(WINDOW)
    windows = protocol.windows(len(ids))
    return TokenStream(protocol, ids, windows, len(windows))


def plain_loop(model: Any, base: Any, ids: Tensor, window: int) -> dict[str, float]:
    """The protocols as one would write them on a blackboard: a window, a token, a sum, in
    float64."""
    window_means, divergences, same, squares = [], [], [], []
    for begin in range(0, len(ids) - window + 1, window):
        tokens = ids[begin : begin + window]
        with torch.no_grad():
            q = model(tokens[None]).logits[0].double().softmax(-1)
            p = base(tokens[None]).logits[0].double().softmax(-1)
        losses = []
        for t in range(window - 1):
            truth = int(tokens[t + 1])
            losses.append(-math.log(q[t, truth]))
            divergences.append(
                sum(
                    float(a) * math.log(float(a) / float(b))
                    for a, b in zip(p[t], q[t], strict=True)
                )
            )
            same.append(int(p[t].argmax()) == int(q[t].argmax()))
            squares.append(float(q[t, truth] - p[t, truth]) ** 2)
        window_means.append(sum(losses) / len(losses))
    return {
        "perplexity": math.exp(sum(window_means) / len(window_means)),
        "kl": sum(divergences) / len(divergences), "kl_max": max(divergences),
        "top1": sum(same) / len(same), "rms": math.sqrt(sum(squares) / len(squares)),
    }  # fmt: skip


def test_one_pass_is_the_plain_loop(reference: Any, candidate: Any, ids: Tensor) -> None:
    expected = plain_loop(candidate, reference, ids, WINDOW)
    scores = score_models({"c": candidate, "r": reference}, stream_of(ids), reference="r")
    divergence = scores["c"].divergence
    assert divergence is not None
    assert scores["r"].divergence is None
    assert scores["c"].perplexity.estimate.value == pytest.approx(expected["perplexity"], rel=1e-6)
    assert divergence.mean_kl.value == pytest.approx(expected["kl"], rel=1e-5)
    assert divergence.max_kl == pytest.approx(expected["kl_max"], rel=1e-5)
    assert divergence.top1_agreement.value == pytest.approx(expected["top1"], abs=1e-12)
    assert divergence.rms_delta_p.value == pytest.approx(expected["rms"], rel=1e-5)
    assert divergence.tokens == 7 * (WINDOW - 1)


def test_the_reference_is_scored_as_it_is_alone(
    reference: Any, candidate: Any, ids: Tensor
) -> None:
    together = score_models({"c": candidate, "r": reference}, stream_of(ids), reference="r")["r"]
    alone = score_models({"r": reference}, stream_of(ids))["r"]
    assert np.array_equal(together.perplexity.losses, alone.perplexity.losses)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100], ids=lambda n: f"batch {n}")
def test_the_batch_size_changes_only_rounding(
    batch_size: int, reference: Any, candidate: Any, ids: Tensor
) -> None:
    pair = {"r": reference, "c": candidate}
    expected = score_models(pair, stream_of(ids), reference="r", batch_size=1)["c"]
    got = score_models(pair, stream_of(ids), reference="r", batch_size=batch_size)["c"]
    np.testing.assert_allclose(got.perplexity.losses, expected.perplexity.losses, atol=2e-5)
    assert got.divergence is not None
    assert expected.divergence is not None
    np.testing.assert_allclose(got.divergence.kl, expected.divergence.kl, atol=2e-5)


def test_a_model_is_no_distance_from_itself(reference: Any, ids: Tensor) -> None:
    scores = score_models({"r": reference, "same": reference}, stream_of(ids), reference="r")
    divergence = scores["same"].divergence
    assert divergence is not None
    assert not divergence.kl.any()
    assert divergence.top1_agreement.value == 1.0
    assert scores["same"].perplexity.ratio_to(scores["r"].perplexity).value == 1.0


@pytest.mark.parametrize("elements", [1, 60, 1000, 1 << 22], ids=lambda n: f"{n} elements")
def test_chunks_change_nothing(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(23, 50, generator=torch.Generator().manual_seed(3)).bfloat16()
    targets = torch.arange(23)
    expected = -logits.float().log_softmax(-1)[torch.arange(23), targets]
    monkeypatch.setattr(perplexity_module, "CHUNK_ELEMENTS", elements)
    covered = [i for part in position_chunks(23, 50) for i in range(23)[part]]
    assert covered == list(range(23))
    assert torch.equal(token_nll(logits, targets), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_log_softmax_is_float32_whatever_the_logits(dtype: torch.dtype) -> None:
    logits = (8 * torch.randn(40, 500, generator=torch.Generator().manual_seed(4))).to(dtype)
    targets = torch.arange(40)
    exact = -logits.double().log_softmax(-1)[torch.arange(40), targets]
    nll = token_nll(logits, targets)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll.double(), exact, rtol=1e-6, atol=1e-6)


class Scripted:
    """A model whose logits are zero but for what ``spoil`` does to those of chosen windows."""

    device = torch.device("cpu")

    def __init__(self, spoil: dict[int, float] | None = None, vocabulary: int = VOCABULARY) -> None:
        self.spoil, self.vocabulary, self.windows = spoil or {}, vocabulary, 0

    def __call__(self, input_ids: Tensor, use_cache: bool) -> Any:
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        for row in range(len(input_ids)):
            if self.windows in self.spoil:
                logits[row, 3] = self.spoil[self.windows]
            self.windows += 1
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=["NaN", "inf", "-inf"])
def test_a_broken_model_is_named_as_soon_as_it_breaks(value: float, ids: Tensor) -> None:
    done: list[int] = []
    with pytest.raises(
        QuantizationError,
        match=r"sick gave a NaN or infinite loss at 1 of 30 tokens of windows 4 to 5",
    ):
        score_models(
            {"sick": Scripted({4: value})},
            stream_of(ids),
            batch_size=2,
            advance=lambda n, total: done.append(n),
        )
    assert done == [2, 4]  # windows 6 and 7 were not fed


def test_a_uniform_model_has_the_vocabulary_for_perplexity(ids: Tensor) -> None:
    estimate = score_models({"uniform": Scripted()}, stream_of(ids))["uniform"].perplexity.estimate
    assert estimate.value == pytest.approx(VOCABULARY, rel=1e-6)
    assert estimate.standard_error == pytest.approx(0.0, abs=1e-9)


def test_vocabularies_of_different_sizes_are_refused(ids: Tensor) -> None:
    with pytest.raises(UsageError, match="wide has a vocabulary of 51 and r of 50"):
        score_models(
            {"r": Scripted(), "wide": Scripted(vocabulary=51)}, stream_of(ids), reference="r"
        )


def test_a_batch_of_none_is_refused(ids: Tensor) -> None:
    with pytest.raises(UsageError, match="--batch-size 0"):
        score_models({"m": Scripted()}, stream_of(ids), batch_size=0)


def test_strided_windows_are_scored_token_by_token(
    reference: Any, candidate: Any, ids: Tensor
) -> None:
    """Every token but the first once, each predicted from the context that its window gives it; the
    tail is shorter."""
    protocol = StridedProtocol(WINDOW, 5)
    nll, kl = [], []
    for window in protocol.windows(len(ids)):
        for t in range(window.scored, window.end):
            with torch.no_grad():
                q = candidate(ids[None, window.begin : t]).logits[0, -1].double().log_softmax(-1)
                p = reference(ids[None, window.begin : t]).logits[0, -1].double().log_softmax(-1)
            nll.append(-float(q[ids[t]]))
            kl.append(float((p.exp() * (p - q)).sum()))
    scores = score_models(
        {"r": reference, "c": candidate}, stream_of(ids, protocol), reference="r", batch_size=3
    )["c"]
    assert len(nll) == len(ids) - 1
    np.testing.assert_allclose(scores.perplexity.losses, nll, atol=2e-5)
    assert scores.perplexity.estimate.value == pytest.approx(
        math.exp(sum(nll) / len(nll)), rel=1e-5
    )
    assert scores.perplexity.estimate.method == "block bootstrap"
    assert scores.divergence is not None
    np.testing.assert_allclose(scores.divergence.kl, kl, atol=2e-5)


def test_batches_hold_every_window_once_longest_first(ids: Tensor) -> None:
    stream = stream_of(ids, StridedProtocol(WINDOW, 6))
    found = list(batches(stream, 4, logit_bytes=4))
    numbers = [n for batch in found for n in batch.numbers]
    assert sorted(numbers) == list(range(len(stream.windows)))
    assert [b.fed.shape[1] for b in found] == sorted((b.fed.shape[1] for b in found), reverse=True)
    for batch in found:
        for row, window in zip(batch.fed, batch.windows, strict=True):
            assert torch.equal(row[: window.fed], ids[window.begin : window.end - 1])
            assert not row[window.fed :].any()


def test_a_long_window_does_not_turn_the_positions_of_short_ones(ids: Tensor) -> None:
    """ "longrope": a pass of more tokens than the model was first trained on has other
    frequencies, for the short windows in it too."""
    model = long_rope(WINDOW // 2, VOCABULARY)
    windows = stream_of(ids, StridedProtocol(WINDOW, 6))
    short = TokenWindow(begin=3, scored=4, end=3 + WINDOW // 2)
    mixed = replace(windows, windows=(*windows.windows, short, replace(short, end=short.end - 2)))
    alone, together = (
        score_models({"m": model}, mixed, batch_size=n)["m"].perplexity.losses for n in (1, 100)
    )
    np.testing.assert_allclose(together, alone, atol=2e-5)


@pytest.mark.parametrize(
    ("logit_bytes", "size"),
    [(2 * 4096, 8), (2 * 262_144, 4), (1 << 30, 1)],
    ids=["small", "large", "vast"],
)
def test_a_vast_vocabulary_takes_fewer_windows_at_a_time(logit_bytes: int, size: int) -> None:
    stream = stream_of(torch.zeros(512 * 9, dtype=torch.int64), GptqProtocol(512))
    assert len(next(batches(stream, None, logit_bytes)).numbers) == size
