"""The loss against plain definitions, the file of targets, and the text that is learned from."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import EXAMPLE

from llmquant.data.answers import learned_rows
from llmquant.data.sources import Documents, read_documents
from llmquant.data.tokenize import tokenize
from llmquant.errors import QuantizationError, SourceError, UsageError
from llmquant.models.from_folder import load_tokenizer
from llmquant.recipe_sections import QAT
from llmquant.training.schedule import measured_at, rate, windows_of
from llmquant.training.teacher.loss import divergence, hidden_error, make_targets
from llmquant.training.teacher.targets import TargetFile, Teacher, Wanted
from llmquant.training.teacher.text import Calibrated, Window, read_text

VOCABULARY = 50


def logits(seed: int, n: int = 7) -> torch.Tensor:
    return 3 * torch.randn(n, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def plain_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5], ids=["T=1", "T=2.5"])
def test_the_whole_vocabulary_is_the_definition(temperature: float) -> None:
    targets = make_targets(logits(0), 0, temperature, None)
    wanted = plain_kl(logits(0) / temperature, logits(1) / temperature) * temperature**2
    found = divergence(targets, logits(1), temperature)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_top_k_is_the_definition_over_its_bins_and_never_more() -> None:
    p, q = logits(0).double().softmax(-1), logits(1).double().softmax(-1)
    values, ids = p.topk(5)
    bins = torch.cat([values, 1 - values.sum(-1, keepdim=True)], -1)
    others = q.gather(-1, ids)
    others = torch.cat([others, 1 - others.sum(-1, keepdim=True)], -1)
    wanted = (bins * (bins / others).log()).sum(-1)
    found = divergence(make_targets(logits(0), 5, 1.0, None), logits(1))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    assert bool((found <= plain_kl(logits(0), logits(1)) + 1e-6).all())


@pytest.mark.parametrize("k", [0, 5], ids=["all", "top 5"])
def test_nothing_is_lost_to_oneself_and_gradients_are_finite(k: int) -> None:
    for size in (1.0, 30.0):  # the second: the rest has next to no probability
        q = (logits(0) * size).requires_grad_()
        kl = divergence(make_targets(q.detach(), k, 1.0, None), q)
        kl.sum().backward()
        assert float(kl.detach().abs().max()) < 1e-4
        assert q.grad is not None
        assert float(q.grad.abs().max()) < 1e-3


def test_a_tiny_rest_has_its_value_and_its_gradient() -> None:
    """The student's rest is far below what float32 has left of 1 less the others."""
    p, q = logits(0, 3), logits(1, 3)
    q[:] = -40.0
    ids = p.topk(5).indices
    q.scatter_(-1, ids, p.gather(-1, ids))
    rows = [x.clone().requires_grad_() for x in (q, q.double())]
    targets = make_targets(p, 5, 1.0, None)
    found = divergence(targets, rows[0])
    log_q = rows[1].log_softmax(-1)
    others = log_q.scatter(-1, ids, float("-inf")).logsumexp(-1)
    rest = targets.rest.double()
    said = (targets.logprobs.double().exp() * (targets.logprobs - log_q.gather(-1, ids))).sum(-1)
    wanted = said + rest.exp() * (rest - others)
    assert float(others.detach().max()) < -30
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    found.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(rows[0].grad.double(), rows[1].grad, rtol=1e-4, atol=1e-7)
    assert float(rows[0].grad.scatter(-1, ids, 0.0).sum()) < -1e-3  # the rest is to grow


def test_the_hidden_error_is_relative() -> None:
    hidden = torch.ones(3, 4)
    targets = make_targets(logits(0, 3), 5, 1.0, hidden)
    torch.testing.assert_close(hidden_error(targets, 1.5 * hidden), torch.full((3,), 0.25))


def wanted_windows(count: int, hidden: bool = False, together: int = 1) -> Wanted:
    windows = [Window(torch.arange(8) + i, torch.ones(7)) for i in range(count)]
    return Wanted(windows, 1, 5, 1.0, hidden, together)


class Asked:
    """A teacher of drawn logits that notes what it was asked."""

    def __init__(self, hidden: bool = False) -> None:
        self.indices: list[list[int]] = []
        self._hidden = hidden

    def targets(self, indices: Sequence[int]):
        self.indices.append(list(indices))
        return [
            make_targets(logits(i), 5, 1.0, logits(i)[:, :6] if self._hidden else None)
            for i in indices
        ]


@pytest.mark.parametrize("hidden", [False, True], ids=["logits", "hidden states too"])
def test_the_file_gives_back_what_the_teacher_said(tmp_path: Path, hidden: bool) -> None:
    file = TargetFile(
        tmp_path / "t.bin", wanted_windows(3, hidden), VOCABULARY, 6, torch.device("cpu")
    )
    file.fill(lambda: Asked(hidden), lambda *_: None)
    assert (tmp_path / "t.bin").stat().st_size == file.nbytes
    for found, said in zip(file.targets(range(3)), Asked(hidden).targets(range(3)), strict=True):
        assert torch.equal(found.ids, said.ids)
        assert torch.equal(found.logprobs, said.logprobs)
        assert torch.equal(found.rest, said.rest)
        if hidden:
            assert torch.equal(found.hidden, said.hidden.half())


@pytest.mark.parametrize(
    ("together", "asked"), [(1, [[3], [4]]), (2, [[2, 3], [4]]), (8, [[0, 1, 2, 3, 4]])]
)
def test_a_torn_file_is_filled_from_its_last_whole_record(
    together: int, asked: list[list[int]], tmp_path: Path
) -> None:
    """What a run without a break asks for at once is asked for at once again."""
    path = tmp_path / "t.bin"
    wanted = wanted_windows(5, together=together)
    file = TargetFile(path, wanted, VOCABULARY, 6, torch.device("cpu"))
    file.fill(lambda: Asked(), lambda *_: None)
    whole = path.read_bytes()
    size = len(whole) // 5
    damaged = bytearray(whole[: 4 * size + 11])
    damaged[3 * size + 40] ^= 255
    path.write_bytes(damaged)
    again = Asked()
    file.fill(lambda: again, lambda *_: None)
    assert again.indices == asked
    assert path.read_bytes() == whole


class Drawn(torch.nn.Module):
    """Logits of a window that depend on its first token; ``bad``: of this one NaN."""

    device = torch.device("cpu")

    def __init__(self, bad: int | None = None) -> None:
        super().__init__()
        self.bad, self.sizes = bad, []

    def forward(self, ids: torch.Tensor, **_: object) -> object:
        self.sizes.append(len(ids))
        rows = [logits(int(row[0]), 8) for row in ids]
        for row, first in zip(rows, ids[:, 0].tolist(), strict=True):
            row[3, 2] += float("nan") if first == self.bad else 0.0
        return SimpleNamespace(logits=torch.stack(rows), hidden_states=None)


def test_windows_asked_for_at_once_are_those_asked_for_one_by_one() -> None:
    wanted, model = wanted_windows(4), Drawn()
    teacher = Teacher(model, wanted)
    alone = [teacher.targets([i])[0] for i in (0, 3, 2)]
    for found, said in zip(teacher.targets([0, 3, 2]), alone, strict=True):
        assert torch.equal(found.ids, said.ids)
        assert torch.equal(found.logprobs, said.logprobs)
    assert model.sizes == [1, 1, 1, 3]
    with pytest.raises(QuantizationError, match="NaN or infinite"):
        Teacher(Drawn(bad=3), wanted).targets([0, 3, 2])


def test_a_file_larger_than_allowed_is_refused_with_a_k_that_fits(tmp_path: Path) -> None:
    file = TargetFile(tmp_path / "t.bin", wanted_windows(4), VOCABULARY, 6, torch.device("cpu"))
    with pytest.raises(UsageError, match=r"--top-k 2\b"):
        file.check_size(file.nbytes // 2)


def text_of(source: str, **options: object):
    section = QAT.model_validate({"seqlen": 32, "heldout": 3, "batch_size": 2, **options})
    return read_text(
        section,
        source,
        load_tokenizer(EXAMPLE),
        seed=0,
        vocab_size=4096,
        max_positions=2048,
    )


def test_held_out_windows_are_not_trained_on(text: Path) -> None:
    found = text_of(f"file:{text}")
    trained = {tuple(w.ids.tolist()) for w in found.training}
    assert trained.isdisjoint({tuple(w.ids.tolist()) for w in found.heldout})
    assert len(found.heldout) == 3
    assert found.tokens == 31 * len(found.training)
    assert (
        text_of(f"file:{text}").sha256 == found.sha256 != text_of(f"file:{text}", heldout=4).sha256
    )


def test_what_the_start_was_calibrated_on_is_not_held_out(text: Path) -> None:
    section = QAT.model_validate({"seqlen": 32, "heldout": 20, "batch_size": 2})
    tokenizer = load_tokenizer(EXAMPLE)
    sha256 = read_documents(f"file:{text}").sha256
    ids = tokenizer(text.read_text(encoding="utf-8"))["input_ids"]
    seen = range(0, len(ids) - 40 * 32, 48)  # all but the last forty windows, by others of 48
    calibrated = Calibrated(sha256, 48, tuple(seen))
    more = {"seed": 0, "vocab_size": 4096, "max_positions": 2048}
    found = read_text(section, f"file:{text}", tokenizer, **more, calibrated=calibrated)
    end = seen[-1] + 48
    for window in found.heldout:
        places = [i for i in range(0, len(ids), 32) if ids[i : i + 32] == window.ids.tolist()]
        assert max(places) >= end
    other = read_text(
        section,
        f"file:{text}",
        tokenizer,
        **more,
        calibrated=Calibrated("another", 48, tuple(seen)),
    )
    assert other.sha256 != found.sha256


def windows_in(source: str) -> list[bytes]:
    ids = load_tokenizer(EXAMPLE)(Path(source.removeprefix("file:")).read_text())["input_ids"]
    cut = [ids[i : i + 32] for i in range(0, len(ids) - 31, 32)]
    return [torch.tensor(c).numpy().tobytes() for c in cut]


def as_bytes(windows: tuple[Window, ...]) -> set[bytes]:
    return {w.ids.numpy().tobytes() for w in windows}


def test_the_same_text_to_hold_out_is_split(text: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_bytes(text.read_bytes())
    plain = text_of(f"file:{text}")
    for other in (text, copy):
        found = text_of(f"file:{text}", heldout_source=f"file:{other}")
        assert found.sha256 == plain.sha256
        assert as_bytes(found.training).isdisjoint(as_bytes(found.heldout))
        assert any("is the same text" in line for line in found.lines)


def test_windows_that_are_held_out_too_are_not_trained_on(text: Path, tmp_path: Path) -> None:
    part = tmp_path / "part.txt"
    part.write_text(text.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    found = text_of(f"file:{text}", heldout_source=f"file:{part}", heldout=5)
    held = as_bytes(found.heldout)
    assert held <= set(windows_in(f"file:{text}"))
    assert as_bytes(found.training) == set(windows_in(f"file:{text}")) - held
    assert any("5 windows that are held out" in line for line in found.lines), found.lines
    (tmp_path / "short.txt").write_text("Once upon a time.", encoding="utf-8")
    with pytest.raises(SourceError, match=r"gives .* need 160 tokens"):
        text_of(f"file:{text}", heldout_source=f"file:{tmp_path / 'short.txt'}", heldout=5)


def test_chats_with_few_answers_need_more_than_they_have(tmp_path: Path) -> None:
    """What is asked for is more than there is, by the share of windows that can be used."""
    said = "Tell me a long story about a cat and a dog. " * 40
    chat = [{"role": "user", "content": said}, {"role": "assistant", "content": "No."}]
    path = tmp_path / "chats.jsonl"
    path.write_text(2 * (json.dumps({"messages": chat}) + "\n"), encoding="utf-8")
    with pytest.raises(SourceError) as told:
        text_of(f"jsonl:{path}")
    has, windows, needed = (
        int(re.search(pattern, str(told.value))[1].replace(",", ""))
        for pattern in (r"gives ([\d,]+) tokens", r"tokens, ([\d,]+) windows", r"about ([\d,]+)")
    )
    assert 0 < windows < 5
    assert needed == pytest.approx(has / windows * 5, rel=0.1)


def test_too_little_text_is_refused_with_what_is_needed(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Once upon a time.", encoding="utf-8")
    with pytest.raises(SourceError, match=r"need 160 tokens"):
        text_of(f"file:{tmp_path / 'short.txt'}")


def test_of_chats_the_answers_count(tmp_path: Path) -> None:
    chats = [
        [
            {"role": "user", "content": f"Who is {n}?"},
            {"role": "assistant", "content": f"{n} is a cat."},
            {"role": "user", "content": "And then?"},
            {"role": "assistant", "content": "She sleeps."},
        ]
        for n in ("Lily", "Tom")
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": c}) + "\n" for c in chats), encoding="utf-8")
    tokenizer = load_tokenizer(EXAMPLE)
    dropped: Counter[str] = Counter()
    rows = learned_rows(read_documents(f"jsonl:{path}"), tokenizer, dropped, dropped)
    assert not dropped
    for (ids, learned), name in zip(rows, ("Lily", "Tom"), strict=True):
        said = tokenizer.decode(ids[learned])
        assert f"{name} is a cat." in said
        assert "She sleeps." in said
        assert "Who" not in said
        assert "then" not in said


def test_what_a_template_leaves_out_of_a_chat_is_told_as_calibration_tells_it(
    tmp_path: Path,
) -> None:
    turns = [{"role": "user", "content": "Who is it?"}, {"role": "assistant", "content": "A cat."}]
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
    rows = [{"messages": turns, "tools": tools}, {"messages": turns * 40}]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    section = QAT.model_validate({"seqlen": 16, "batch_size": 2, "heldout": 2, "micro_batch": 1})
    tokenizer = load_tokenizer(EXAMPLE)
    text = read_text(
        section, f"jsonl:{path}", tokenizer, seed=0, vocab_size=4096, max_positions=None
    )
    dropped, incomplete = Counter[str](), Counter[str]()
    list(tokenize(read_documents(f"jsonl:{path}"), tokenizer, dropped, incomplete=incomplete))
    assert incomplete == {"chats whose tools the chat template leaves out": 1}
    assert "  partly   1 chats whose tools the chat template leaves out" in text.lines
    assert not any("dropped" in line and "tools" in line for line in text.lines)


def test_a_chat_without_answers_is_counted() -> None:
    from llmquant.data.chats import parse_chat

    chat = parse_chat([{"role": "user", "content": "Hello there"}])
    dropped: Counter[str] = Counter()
    assert learned_rows(Documents.of([chat], "x"), load_tokenizer(EXAMPLE), dropped, dropped) == []
    assert list(dropped.values()) == [1]


@pytest.mark.parametrize("content", [None, "", " \n"])
def test_an_empty_answer_is_none(content: str | None) -> None:
    """Its only token would be the end of the turn."""
    from llmquant.data.chats import parse_chat

    asked, said = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A cat."}
    chat = parse_chat([asked, {"role": "assistant", "content": content}, asked, said])
    dropped, partly = Counter[str](), Counter[str]()
    tokenizer = load_tokenizer(EXAMPLE)
    ((ids, learned),) = learned_rows(Documents.of([chat], "x"), tokenizer, dropped, partly)
    text = tokenizer.decode(ids[learned])
    assert text.count("A cat.") == 1
    assert len(text) < len("A cat.") + 20
    assert (dropped, partly) == ({}, {"empty answers": 1})


def test_every_epoch_shows_every_window_once() -> None:
    seen = [i for step in range(5) for i in windows_of(step, 10, 2, 0)]
    assert sorted(seen) == list(range(10))
    again = [i for step in range(5, 10) for i in windows_of(step, 10, 2, 0)]
    assert sorted(again) == list(range(10))
    assert seen != again


def test_the_rate_warms_up_and_falls() -> None:
    options = QAT(steps=100, warmup=0.1)
    rates = [rate(step, options) for step in range(100)]
    assert rates[9] == max(rates) == 1.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert measured_at(options) == set(range(10, 101, 10))
