"""How much continuous batching gains, and what abuse leaves behind: the served model over HTTP, in
one run on one machine.

    python bench/serve.py MODEL [--abuse 500] [--manager] [--output FILE]

Throughput: greedy tokens per second of one stream and of 8 at once, repeated alternately, medians
and their ratio. ``--manager`` also measures transformers' own ContinuousBatchingManager on the same
prompts, in process. Abuse: requests of which some leave, some are malformed, some read slowly and
some properly, 24 at a time; then slots, gate and resident memory are compared with before, and
every finished greedy answer with the model: ``worst_gap`` is how far below the best logit any of
its tokens lies, which batching may make a rounding step and no more. MODEL ``random-0.5b`` writes a
random Llama of 0.5 billion parameters, quantized to W4 g128, into a temporary folder first.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import socket
import statistics
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
import uvicorn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import llmquant
from llmquant_serve.api.app import create_app
from llmquant_serve.engines.local import LocalEngine
from llmquant_serve.generation.text_model import TextModel
from llmquant_serve.service import Limits, Service

TINY = Path(__file__).resolve().parents[1] / "examples" / "tiny-llama"
STREAMS = 8
PROMPT = [0, 462, 3088, 314, 264, 1329, 874, 17]


def random_model(folder: Path) -> Path:
    """A Llama of 0.49 billion parameters with tiny-llama's tokenizer, W4 g128 by rounding."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1280,
        intermediate_size=3456,
        num_hidden_layers=24,
        num_attention_heads=20,
        num_key_value_heads=20,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "dense")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder / "dense")
    recipe = llmquant.Recipe.model_validate({"method": "rtn", "scales": {"steps": 0}})
    return llmquant.quantize(folder / "dense", folder / "packed", recipe).path


class Live:
    """A server in a thread."""

    def __init__(self, path: Path) -> None:
        self.model = llmquant.load(path)
        engine = LocalEngine(self.model, STREAMS)
        self.service = Service(
            engine, TextModel(path, engine.info.vocab), path.name, Limits(stall_seconds=5)
        )
        self._server = uvicorn.Server(uvicorn.Config(create_app(self.service), log_level="error"))
        self._sock = socket.socket()
        self._sock.bind(("127.0.0.1", 0))
        self._sock.listen(512)
        self.url = f"http://127.0.0.1:{self._sock.getsockname()[1]}"
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._sock]})
        self._thread.start()
        while not self._server.started:
            time.sleep(0.05)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._sock.close()


async def stream(client: httpx.AsyncClient, tokens: int) -> int:
    body: dict[str, Any] = {
        "prompt": PROMPT,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    body |= {"stream": True, "return_token_ids": True}
    made = 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                made += len(json.loads(line[6:])["choices"][0]["token_ids"])
    return made


async def throughput(url: str, tokens: int, repeats: int) -> dict[str, Any]:
    """Medians of tokens per second, one stream and STREAMS, taken alternately."""
    rates_of: dict[int, list[float]] = {1: [], STREAMS: []}
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        await stream(client, 8)
        for _ in range(repeats):
            for count, rates in rates_of.items():
                began = time.perf_counter()
                made = sum(await asyncio.gather(*(stream(client, tokens) for _ in range(count))))
                rates.append(made / (time.perf_counter() - began))
    one, many = (statistics.median(r) for r in rates_of.values())
    return {
        "tokens": tokens,
        "repeats": repeats,
        "one": round(one, 1),
        "eight": round(many, 1),
        "ratio": round(many / one, 2),
    }


def manager_throughput(path: Path, tokens: int) -> dict[str, Any]:
    """The same of transformers' ContinuousBatchingManager, through generate_batch."""
    from transformers import GenerationConfig

    model: Any = llmquant.load(path)
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=5
    )
    rates = {}
    for count in (1, STREAMS):
        model.generate_batch([PROMPT] * count, generation_config=config)
        began = time.perf_counter()
        out = model.generate_batch([PROMPT] * count, generation_config=config)
        rates[count] = sum(len(o.generated_tokens) for o in out.values()) / (
            time.perf_counter() - began
        )
    return {
        "one": round(rates[1], 1),
        "eight": round(rates[STREAMS], 1),
        "ratio": round(rates[STREAMS] / rates[1], 2),
    }


def worst_gap(model: Any, answers: set[tuple[int, ...]]) -> float:
    """How far below the best logit any token of the greedy answers lies, by one forward pass over
    each answer alone."""
    worst = 0.0
    with torch.inference_mode():
        for ids in answers:
            logits = model(torch.tensor([[*PROMPT, *ids]])).logits[0, len(PROMPT) - 1 : -1].float()
            worst = max(
                worst,
                float((logits.amax(-1) - logits.gather(1, torch.tensor(ids)[:, None])[:, 0]).max()),
            )
    return worst


ASKED: dict[str, Any] = {
    "prompt": PROMPT,
    "max_tokens": 24,
    "temperature": 0,
    "ignore_eos": True,
    "return_token_ids": True,
}
MALFORMED = (b"{", b'{"prompt": 3}', b'{"prompt": "a", "n": -1}', b'{"prompt": [[]]}')
LEFT = 0  # the status of a request that did not wait for its answer


class Abuser:
    """Requests of every kind; counts statuses and short answers, collects the finished ones."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client, self.rng = client, random.Random(0)
        self.statuses: Counter[int] = Counter()
        self.short = 0
        self.answers: set[tuple[int, ...]] = set()

    async def round_of(self, number: int) -> None:
        """So many requests, 24 at a time."""
        kinds = [self.rng.choice(["leave", "malformed", "slow", "proper"]) for _ in range(number)]
        await asyncio.gather(*(self._in_turn(kinds[i::24]) for i in range(24)))

    async def _in_turn(self, kinds: list[str]) -> None:
        for kind in kinds:
            if kind == "malformed":
                status = await self._malformed()
            elif kind == "leave":
                status = await self._leave()
            else:
                status = await self._read(pause=0.02 if kind == "slow" else 0.0)
            self.statuses[status] += 1

    async def _malformed(self) -> int:
        body = self.rng.choice([*MALFORMED, self.rng.randbytes(200)])
        headers = {"content-type": "application/json"}
        answer = await self.client.post("/v1/completions", content=body, headers=headers)
        return answer.status_code

    async def _leave(self) -> int:
        long, patience = ASKED | {"max_tokens": 1500}, self.rng.uniform(0.01, 1.0)
        try:
            answer = await self.client.post("/v1/completions", json=long, timeout=patience)
        except httpx.TimeoutException:
            return LEFT
        return answer.status_code

    async def _read(self, pause: float) -> int:
        body, ids = ASKED | {"stream": True}, []
        async with self.client.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if answer.status_code == 200 and line.startswith("data: {"):
                    ids += json.loads(line[6:])["choices"][0]["token_ids"]
                await asyncio.sleep(pause)
        if answer.status_code == 200:
            self.short += len(ids) != ASKED["max_tokens"]
            self.answers.add(tuple(ids))
        return answer.status_code


def resident_mb() -> float:
    gc.collect()
    return round(psutil.Process().memory_info().rss / 2**20, 1)


async def abuse(live: Live, count: int) -> dict[str, Any]:
    """``count`` requests of every kind; counts of statuses, what is left open, and resident memory
    before and after."""
    async with httpx.AsyncClient(
        base_url=live.url, timeout=120, limits=httpx.Limits(max_connections=None)
    ) as client:
        abuser = Abuser(client)
        await abuser.round_of(100)  # what is allocated once
        before = resident_mb()
        abuser.statuses.clear()
        await abuser.round_of(count)
    while live.service.engine.load().running or live.service.gate.open:
        await asyncio.sleep(0.05)
    after = resident_mb()
    statuses = sorted(abuser.statuses.items())
    return {
        "requests": count,
        "statuses": {("left" if s == LEFT else str(s)): n for s, n in statuses},
        "short": abuser.short,
        "different_answers": len(abuser.answers),
        "worst_gap": round(worst_gap(live.model, abuser.answers), 4),
        "rss_before_mb": before,
        "rss_after_mb": after,
        "open": live.service.gate.open,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--abuse", type=int, default=0)
    parser.add_argument("--manager", action="store_true")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = random_model(Path(scratch)) if asked.model == "random-0.5b" else Path(asked.model)
        live = Live(path)
        try:
            results: dict[str, Any] = {
                "model": asked.model,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
            results["local"] = asyncio.run(throughput(live.url, asked.tokens, asked.repeats))
            if asked.abuse:
                results["abuse"] = asyncio.run(abuse(live, asked.abuse))
        finally:
            live.close()
        if asked.manager:
            results["manager"] = manager_throughput(path, asked.tokens)
    text = json.dumps(results, indent=1)
    print(text)
    if asked.output:
        asked.output.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
