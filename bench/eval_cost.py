"""What it costs to evaluate a packed model instead of the dense one it was made from: time and peak
memory, as ratios.

Packed linears dequantize their weight at every call, so a forward over few rows pays for that and
one over many hardly does. Both models are scored in turn, in one process, over the same windows,
and the least time of each counts. Times drift by tenths on a shared machine and what disturbs one
of a pair seldom disturbs both for all repeats; the ratio is the figure. Memory is the highest
resident set of a fresh process that scores one model.

    python bench/eval_cost.py [--threads 1,2] [--repeats 4] [--tokens 2048,4096,8192] [--out
    bench/results/eval_cost.json]

Models: examples/tiny-llama, and a Llama of 0.19 billion random weights made on the fly; both
rounded to W4 g128. ``TOKENS_PER_BATCH`` of llmquant_eval.scoring.batches is chosen from the result.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import llmquant
from llmquant_eval.report.machine import processor, versions
from llmquant_eval.scoring.batches import TOKENS_PER_BATCH
from llmquant_eval.scoring.protocols import GptqProtocol
from llmquant_eval.scoring.score_models import score_models
from llmquant_eval.scoring.token_stream import TokenStream

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "examples" / "tiny-llama"
WINDOWS = (512, 2048)
LENGTH = {"tiny-llama": 32_768, "llama-0.19b": 8_192}  # tokens scored per timing


def random_llama(folder: Path) -> None:
    """A Llama of 0.19 billion weights whose tokenizer is tiny-llama's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=14,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).half().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, folder / name)


def models(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Name → (dense folder, packed folder)."""
    random_llama(folder / "llama-0.19b")
    pairs = {
        "tiny-llama": (TINY, folder / "tiny-w4"),
        "llama-0.19b": (folder / "llama-0.19b", folder / "0.19b-w4"),
    }
    for dense, packed in pairs.values():
        llmquant.quantize(dense, packed, llmquant.load_recipe("rtn-w4g128"))
    return pairs


def stream(tokens: int, window: int) -> TokenStream:
    """Random ids, cut as ``ppl/gptq`` cuts."""
    protocol = GptqProtocol(window)
    ids = torch.randint(0, 4096, (tokens,), generator=torch.Generator().manual_seed(0))
    return TokenStream(protocol, ids, protocol.windows(tokens), tokens // window)


def seconds(pair: Sequence[Any], cut: TokenStream, batch_size: int, repeats: int) -> list[float]:
    """Least time of each model, scored in turn."""
    best = [float("inf")] * len(pair)
    for _ in range(repeats):
        for i, model in enumerate(pair):
            start = time.perf_counter()
            score_models({"model": model}, cut, batch_size=batch_size)
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def timings(
    name: str, pair: tuple[Path, Path], sizes: Sequence[int], repeats: int
) -> list[dict[str, Any]]:
    """One entry per window and batch."""
    loaded = [llmquant.load(path) for path in pair]
    table = []
    for window in WINDOWS:
        for tokens in sizes:
            cut = stream(LENGTH[name], window)
            dense, packed = seconds(loaded, cut, max(1, tokens // window), repeats)
            entry = {
                "window": window,
                "tokens_per_batch": tokens,
                "threads": torch.get_num_threads(),
                "dense_tokens_per_second": round(LENGTH[name] / dense),
                "ratio": round(packed / dense, 3),
            }
            table.append(entry)
            print(name, entry, file=sys.stderr, flush=True)
    return table


def memory(path: Path, window: int) -> dict[str, int]:
    """Peak and floor, in bytes, of a process that scores one model and does nothing else."""
    command = [sys.executable, __file__, "--child", str(path), "--window", str(window)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peaks: dict[str, int] = json.loads(done.stdout)
    return peaks


def child(path: Path, window: int) -> None:
    """Score two batches of the default size and print what memory it took."""
    import transformers

    _ = (transformers.AutoModelForCausalLM, llmquant.load)  # imported before the floor is read
    floor = llmquant.resident_bytes()
    model = llmquant.load(path)
    score_models({"model": model}, stream(2 * TOKENS_PER_BATCH, window))
    print(json.dumps({"floor": floor, "peak": llmquant.peak_resident_bytes()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--tokens", default="2048,4096,8192")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "eval_cost.json"
    )
    parser.add_argument("--child", type=Path)
    parser.add_argument("--window", type=int, default=WINDOWS[0])
    args = parser.parse_args()
    if args.child is not None:
        child(args.child, args.window)
        return
    report: dict[str, Any] = {
        "machine": {"processor": processor(), **versions()},
        "default_tokens_per_batch": TOKENS_PER_BATCH,
        "models": {},
    }
    sizes = [int(n) for n in args.tokens.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        for name, pair in models(Path(folder)).items():
            table = []
            for threads in map(int, args.threads.split(",")):
                torch.set_num_threads(threads)
                table += timings(name, pair, sizes, args.repeats)
            peaks = {
                kind: memory(path, WINDOWS[-1])
                for kind, path in zip(("dense", "packed"), pair, strict=True)
            }
            report["models"][name] = {"time": table, "memory_bytes": peaks}
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
