"""Real tokens as requests: prompts are pieces of a text, answers are drawn from a model, until a
full stop."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from llmquant.drift.monitor import DriftMonitor
from llmquant.drift.observation import DriftObservation, observe_request
from llmquant.drift.profile import DriftProfile, make_drift_profile

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny-llama"
LENGTHS, ANSWER = (12, 20, 28, 36), 24
LONGEST = max(LENGTHS)
TOKENIZER = "0" * 64


def encyclopedia() -> str:
    return (TINY / "heldout.txt").read_text(encoding="utf-8")


def source_code() -> str:
    files = sorted((ROOT / "csrc").rglob("*.cpp"))
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def requests(model: Any, tokenizer: Any, text: str, count: int) -> list[DriftObservation]:
    """``count`` requests; each prompt begins at a place of its own in the text, and its answer is
    drawn from the model."""
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    assert len(ids) >= count * LONGEST
    starts = range(0, len(ids) - LONGEST, len(ids) // count)
    prompts = [ids[s : s + LENGTHS[i % len(LENGTHS)]] for i, s in enumerate(starts[:count])]
    groups = [prompts[i :: len(LENGTHS)] for i in range(len(LENGTHS))]
    found = [seen for prompts in groups for seen in _answered(model, tokenizer, prompts)]
    return random.Random(0).sample(found, len(found))


def _answered(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]]
) -> Iterator[DriftObservation]:
    """Prompts of one length."""
    generator = torch.Generator().manual_seed(0)
    new, cache, chosen = torch.tensor(prompts), None, []
    with torch.inference_mode():
        for _ in range(ANSWER):
            out = model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, log_p = out.past_key_values, out.logits[:, -1].float().log_softmax(-1)
            new = torch.multinomial(log_p.exp(), 1, generator=generator)
            chosen.append((new[:, 0], log_p.gather(1, new)[:, 0], -(log_p.exp() * log_p).sum(-1)))
    tokens, own, entropy = (torch.stack(column, 1).tolist() for column in zip(*chosen, strict=True))
    ends = {tokenizer.eos_token_id, *tokenizer.encode(".", add_special_tokens=False)}
    for row, prompt in enumerate(prompts):
        end = next((i + 1 for i, t in enumerate(tokens[row]) if t in ends), None)
        said = tokens[row][:end]
        yield observe_request(
            prompt,
            said,
            tokenizer.decode(said),
            ended=end is not None,
            logprobs=own[row][:end],
            entropies=entropy[row][:end],
        )


def damaged(model: Any) -> Any:
    """The model with scales that are wrong by a factor of e^0.6 here and there, in one block."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".layers.1." in name and weight.dim() == 2:
                weight *= torch.exp(0.6 * torch.randn(weight.shape[0], 1))
    return model


def split(
    pool: Sequence[DriftObservation], seed: int, sample: int
) -> tuple[DriftProfile, list[DriftObservation]]:
    """A profile of some requests of a pool, and the others in some order."""
    order = random.Random(seed).sample(pool, len(pool))
    return make_drift_profile(order[:sample], "tiny", TOKENIZER), order[sample:]


def first_alarm(monitor: DriftMonitor, stream: Sequence[DriftObservation]) -> int | None:
    """The number of the request that raises it; the monitor is asked after each."""
    return next((i for i, seen in enumerate(stream, 1) if monitor.add(seen)), None)
