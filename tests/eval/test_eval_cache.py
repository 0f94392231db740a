"""A cached reference: exact where it says so, its error measured where it does not, and never read
when damaged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llmquant.errors import CheckpointError, UsageError
from llmquant_eval.report.schema import Report
from llmquant_eval.run.evaluate import evaluate
from llmquant_eval.run.request import Request
from llmquant_eval.scoring.cache_forms import Full16, Top, exact_arrays, parse_form
from llmquant_eval.scoring.divergence import token_divergence
from llmquant_eval.scoring.protocols import GptqProtocol
from llmquant_eval.scoring.reference_cache import INDEX, CacheKey, choose_form, sample_positions
from llmquant_eval.scoring.token_stream import TokenStream

POSITIONS, VOCABULARY, WINDOW = 80, 3000, 64


def pair(
    nearness: float = 0.1, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    p = 3 * torch.randn(POSITIONS, VOCABULARY, generator=draw)
    q = p + nearness * torch.randn(POSITIONS, VOCABULARY, generator=draw)
    return p.to(dtype), q.to(dtype), torch.randint(0, VOCABULARY, (POSITIONS,), generator=draw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("form", "tolerance"),
    [(Full16(), 2e-5), (Top(VOCABULARY), 2e-6), (Top(5 * VOCABULARY), 2e-6)],
    ids=["16 bits", "every token", "more than there are"],
)
def test_a_form_that_keeps_everything_gives_the_exact_divergence(
    form: Full16 | Top, tolerance: float, dtype: torch.dtype
) -> None:
    p, q, targets = pair(dtype=dtype)
    stored = form.window(exact_arrays(p, targets) | form.encode(p), VOCABULARY)
    exact, found = token_divergence(p, q, targets), stored.divergence(q, targets)
    assert torch.equal(found.same_top, exact.same_top)
    assert torch.equal(found.delta_p, exact.delta_p)
    assert torch.equal(found.confidence, exact.confidence)
    torch.testing.assert_close(found.kl, exact.kl, rtol=1e-4, atol=tolerance)
    losses = -p.float().log_softmax(-1)[torch.arange(POSITIONS), targets]
    np.testing.assert_array_equal(stored.losses, losses.double().numpy())


def test_sixteen_bits_leave_an_error_without_a_sign() -> None:
    p, q, targets = pair()
    stored = Full16().window(exact_arrays(p, targets) | Full16().encode(p), VOCABULARY)
    error = (stored.divergence(q, targets).kl - token_divergence(p, q, targets).kl).double()
    assert abs(float(error.mean())) < 3 * float(error.std()) / math.sqrt(POSITIONS)


@pytest.mark.parametrize("k", [1, 16, 500])
def test_the_top_alone_is_a_lower_bound_by_hand(k: int) -> None:
    p, q, targets = pair(nearness=0.5)
    found = (
        Top(k)
        .window(exact_arrays(p, targets) | Top(k).encode(p), VOCABULARY)
        .divergence(q, targets)
    )
    exact = token_divergence(p, q, targets)
    probabilities, others = p.double().softmax(-1), q.double().softmax(-1)
    for position in range(0, POSITIONS, 7):
        kept = probabilities[position].argsort(descending=True)[:k]
        mine, theirs = probabilities[position, kept], others[position, kept]
        rest, their_rest = 1 - mine.sum(), 1 - theirs.sum()
        expected = float((mine * (mine / theirs).log()).sum() + rest * (rest / their_rest).log())
        assert found.kl[position].item() == pytest.approx(expected, rel=1e-4, abs=2e-6)
    assert bool((found.kl <= exact.kl + 1e-6).all())


def test_impossible_tokens_stay_impossible() -> None:
    p = torch.tensor([[0.0, 1.0, -math.inf], [0.0, 1.0, -80.0]])
    impossible = torch.tensor([[0.0, 1.0, 5.0], [0.0, 1.0, -math.inf]])
    targets = torch.tensor([0, 1])
    found = (
        Full16()
        .window(exact_arrays(p, targets) | Full16().encode(p), 3)
        .divergence(impossible, targets)
    )
    assert found.kl[0].item() == pytest.approx(
        token_divergence(p, impossible, targets).kl[0].item(), rel=1e-3
    )
    assert found.kl[1].item() == math.inf  # a probability of e^-81 is small, not zero


@pytest.mark.parametrize("text", ["full", "top", "top-", "top-x", "full-8", "top-0"])
def test_unknown_forms_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--cache-form"):
        parse_form(text)


@pytest.mark.parametrize(
    ("asked", "positions", "vocabulary", "name"),
    [
        (None, 60_000, 4096, "full-16"),
        (None, 341_000, 128_256, "top-512"),
        ("top-7", 10, 10, "top-7"),
    ],
    ids=["small", "large", "as asked"],
)
def test_the_form_follows_the_size(
    asked: str | None, positions: int, vocabulary: int, name: str
) -> None:
    assert choose_form(asked, positions, vocabulary).name == name


def test_samples_are_spread_evenly() -> None:
    protocol = GptqProtocol(11)
    windows = protocol.windows(11 * 40)
    picked = sample_positions(
        TokenStream(protocol, torch.zeros(440), windows, 40), vocabulary=VOCABULARY
    )
    flat = sorted(
        10 * window + position for window, positions in picked.items() for position in positions
    )
    assert len(flat) == 256
    assert (flat[0], flat[-1]) == (0, 399)
    assert set(np.diff(flat)) == {1, 2}


def test_everything_that_decides_the_numbers_is_in_the_name() -> None:
    key = CacheKey("a", "b", "c", "ppl/gptq-64", "float32", "cpu", "auto", "full-16")
    others = [
        replace(key, **{name: 2 if name == "version" else "other"})
        for name in key.__dataclass_fields__
    ]
    assert len({key.name, *(other.name for other in others)}) == 1 + len(others)


@pytest.fixture
def request_with_cache(
    base_model: Path, altered: Callable[..., Path], words: Path, tmp_path: Path
) -> Callable[..., Request]:
    candidate = altered("coarse", lambda w: (w * 32).round() / 32)

    def make(**options: object) -> Request:
        fields = {
            "reference": str(base_model),
            "window": WINDOW,
            "cost": False,
            "cache": str(tmp_path / "cache"),
        }
        return Request((str(candidate),), str(words), **(fields | options))  # type: ignore[arg-type]

    return make


def values(report: Report) -> list[dict[str, float]]:
    return [
        {name: metric.value for name, metric in model.metrics.items()} for model in report.models
    ]


@pytest.mark.parametrize("protocol", ["ppl/gptq-64", "ppl/strided-64-24", "ppl/word-64"])
def test_full_empty_and_no_cache_agree(
    protocol: str, request_with_cache: Callable[..., Request]
) -> None:
    options = {"window": None, "protocol": protocol, "batch_size": 3}
    stages: list[str] = []
    live = evaluate(request_with_cache(cache=None, **options))
    first = evaluate(request_with_cache(**options), lambda stage, done, total: stages.append(stage))
    again: list[str] = []
    second = evaluate(request_with_cache(**options), lambda stage, done, total: again.append(stage))
    assert values(first) == values(second)
    assert f"reference for {protocol}" in stages
    assert f"reference for {protocol}" not in again
    for name, metric in live.models[1].metrics.items():
        assert second.models[1].metrics[name].value == pytest.approx(
            metric.value, rel=2e-3, abs=2e-6
        ), name
    assert live.models[0].metrics.keys() == second.models[0].metrics.keys()
    assert live.models[0].cache_errors == live.models[1].cache_errors == []
    (error,) = second.models[1].cache_errors
    assert (error.form, error.positions) == ("full-16", 256)
    assert 0 < abs(error.mean) <= error.largest < 1e-4
    assert second.noise_floor is not None
    assert live.noise_floor is not None
    assert second.noise_floor.kl_mean.value == pytest.approx(
        live.noise_floor.kl_mean.value, rel=1e-2, abs=1e-6
    )
    assert Report.from_json(second.to_json()) == second


def test_the_stated_error_is_that_of_the_form(request_with_cache: Callable[..., Request]) -> None:
    live = evaluate(request_with_cache(cache=None)).models[1]
    found = evaluate(request_with_cache(cache_form="top-4")).models[1]
    (error,) = found.cache_errors
    assert error.form == "top-4"
    change = found.metrics["kl_mean"].value - live.metrics["kl_mean"].value
    assert change < 0
    assert error.mean == pytest.approx(change, rel=0.3)
    assert found.metrics["top1_agreement"] == live.metrics["top1_agreement"]
    assert found.metrics["perplexity_ratio"] == live.metrics["perplexity_ratio"]


def test_another_text_has_a_cache_of_its_own(
    request_with_cache: Callable[..., Request], tmp_path: Path
) -> None:
    evaluate(request_with_cache(noise_floor=False))
    evaluate(request_with_cache(noise_floor=False, max_windows=4))
    evaluate(request_with_cache(noise_floor=False, dtype="float16"))
    assert len(list((tmp_path / "cache").iterdir())) == 3


def spoil_truncate(folder: Path) -> None:
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])


def spoil_flip(folder: Path) -> None:
    shard = next(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)


def spoil_window(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    index["shards"][0]["windows"].remove(3)
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(spoil_truncate, r"00000\.safetensors: its sha256", id="truncated shard"),
        pytest.param(spoil_flip, r"00000\.safetensors: its sha256", id="one bit changed"),
        pytest.param(
            lambda f: next(f.glob("*.safetensors")).unlink(), "No such file", id="missing shard"
        ),
        pytest.param(
            lambda f: (f / INDEX).write_text("{", encoding="utf-8"), "cache.json", id="broken index"
        ),
        pytest.param(spoil_window, "window 3 is not in it", id="missing window"),
    ],
)
def test_a_damaged_cache_is_refused_by_name(
    spoil: Callable[[Path], None],
    message: str,
    request_with_cache: Callable[..., Request],
    tmp_path: Path,
) -> None:
    evaluate(request_with_cache(noise_floor=False))
    (folder,) = (tmp_path / "cache").iterdir()
    spoil(folder)
    with pytest.raises(CheckpointError, match=rf"(?s)damaged: .*{message}.*delete that folder"):
        evaluate(request_with_cache(noise_floor=False))


def test_a_cache_without_an_index_is_made_anew(
    request_with_cache: Callable[..., Request], tmp_path: Path
) -> None:
    first = evaluate(request_with_cache(noise_floor=False))
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / INDEX).unlink()
    (folder / "99999.safetensors").write_bytes(b"left over")
    assert values(evaluate(request_with_cache(noise_floor=False))) == values(first)
    assert not (folder / "99999.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": None, "cache_form": "top-4"}, "give --cache DIR"),
        ({"reference": None}, "--reference"),
    ],
    ids=["a form without a cache", "no reference"],
)
def test_misuse(
    options: dict[str, object], message: str, request_with_cache: Callable[..., Request]
) -> None:
    with pytest.raises(UsageError, match=message):
        request_with_cache(**options)


def test_a_cache_that_cannot_be_written(
    request_with_cache: Callable[..., Request], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file", encoding="utf-8")
    with pytest.raises(UsageError, match="--cache"):
        evaluate(request_with_cache(noise_floor=False))


def test_the_reference_alone_fills_a_cache(base_model: Path, words: Path, tmp_path: Path) -> None:
    """What ``llmquant auto`` measures the original with; a candidate then does not run it again."""
    given = {"text": f"file:{words}", "reference": str(base_model), "window": 64, "cost": False}
    cache = str(tmp_path / "cache")
    alone = evaluate(Request((str(base_model),), cache=cache, noise_floor=False, **given))
    plain = evaluate(Request((str(base_model),), **(given | {"reference": None})))
    assert [m.role for m in alone.models] == ["reference"]
    assert alone.models[0].metrics["perplexity"].value == pytest.approx(
        plain.models[0].metrics["perplexity"].value, rel=1e-6
    )
    assert len(list((tmp_path / "cache").rglob(INDEX))) == 1
