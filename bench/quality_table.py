"""The table of :mod:`quality`'s results, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def render(report: dict[str, Any], grids: Sequence[str]) -> str:
    """Markdown: one section per model and grid, best KL first."""
    lines = [_HEAD]
    cells = report["cells"]
    for model in dict.fromkeys(c["model"] for c in cells):
        setting = report["settings"][model]
        lines.append(
            f"\n## {model}\n\nCalibration: {setting['nsamples']} windows of {setting['seqlen']} tokens of "
            f"`{setting['calibration']}`; evaluation: {setting['windows']} windows of `{setting['text']}`.\n"
        )
        for grid in (
            g for g in grids if any(c["grid"] == g and c["model"] == model for c in cells)
        ):
            rows: dict[str, list[dict[str, Any]]] = {}
            for c in cells:
                if (c["model"], c["grid"]) == (model, grid):
                    rows.setdefault(c["tool"], []).append(c)
            lines += [f"\n### {grid}\n", _COLUMNS]
            lines += [
                _row(t, rows[t])
                for t in sorted(rows, key=lambda t: statistics.fmean(c["kl_mean"] for c in rows[t]))
            ]
        lines += _further(setting, [c for c in cells if c["model"] == model], grids)
    return "\n".join(lines)


def _further(
    setting: dict[str, Any], cells: Sequence[dict[str, Any]], grids: Sequence[str]
) -> list[str]:
    """The table of further texts and tasks, where any were measured."""
    asked = setting.get("further")
    if not asked:
        return []
    texts, tasks = list(asked["texts"]), asked["tasks"]
    rows = [
        c
        for c in cells
        if c.get("texts", {}).keys() >= set(texts) and c.get("tasks", {}).keys() >= set(tasks)
    ]
    if not rows:
        return []
    names = ", ".join(f"{name}: `{source}`" for name, source in asked["texts"].items())
    head = ["scheme", "tool", *(f"{t}: KL" for t in texts), *(f"{t}: ratio" for t in texts), *tasks]
    right = setting["original"].get("tasks", {})
    original = ["", "original", *([""] * 2 * len(texts)), *(_score(right[t], None) for t in tasks)]
    rows.sort(key=lambda c: (list(grids).index(c["grid"]), c["kl_mean"], c["seed"]))
    table = [head, ["---"] * len(head), *([original] if tasks else [])]
    for c in rows:
        numbers = [c["texts"][t] for t in texts]
        table.append(
            [
                c["grid"], c["tool"], *(f"{n['kl_mean']:.4f}" for n in numbers),
                *(f"{n['perplexity_ratio']:.4f}" for n in numbers),
                *(_score(c["tasks"][t], right[t]) for t in tasks),
            ]
        )  # fmt: skip
    items = (
        f" Tasks: the first {asked['limit']} items each, share of right answers; in brackets the items that only the "
        "original had right, and those that only this one had."
        if tasks
        else ""
    )
    return [
        f"\n### Other texts{' and tasks' if tasks else ''}\n",
        f"The first {asked['windows']} windows of each text ({names}); of chats the answers alone, a window each.{items}\n",
        *(f"| {' | '.join(row)} |" for row in table),
    ]


def _score(task: dict[str, Any], original: dict[str, Any] | None) -> str:
    if original is None:
        return f"{task['score']:.3f} ±{task['standard_error']:.3f}"
    pairs = list(zip(original["correct"], task["correct"], strict=True))
    return f"{task['score']:.3f} ({pairs.count(('1', '0'))}, {pairs.count(('0', '1'))})"


def _row(tool: str, cells: Sequence[dict[str, Any]]) -> str:
    def mean(name: str) -> float:
        return statistics.fmean(c[name] for c in cells)

    # Seconds of an unknown processor do not go into one mean with those of a known one.
    timed = [c for c in cells if "processor" in c] or cells

    def cost(name: str, unit: float, digits: int) -> str:
        measured = [c[name] for c in timed if name in c]
        return f"{statistics.fmean(measured) / unit:.{digits}f}" if measured else "–"

    processors = " / ".join(sorted({c.get("processor", "–") for c in timed}))
    kls = [c["kl_mean"] for c in cells]
    spread = f" ({min(kls):.5f} – {max(kls):.5f})" if len(kls) > 1 else ""
    return (
        f"| {tool} | {mean('kl_mean'):.5f}{spread} | {mean('kl_p99'):.3f} | {mean('perplexity_ratio'):.4f} "
        f"| {mean('top1_agreement'):.3f} | {mean('bits_per_weight'):.3f} | {' | '.join(cost(*c) for c in _COST)} | {processors} | {len(kls)} |"
    )


_COST = (("cpu_seconds", 1, 0), ("peak_bytes", 1e9, 2))
_HEAD = """# Quality beside other tools

Every tool quantizes the same model from the same calibration windows; `llmquant eval` then measures each folder in float32.
[benchmarks.md](benchmarks.md#quality) has the commands. Rendered by `python bench/quality.py table` from
`bench/results/quality.json`; do not edit it by hand.

| column | meaning |
|---|---|
| KL | mean over tokens of KL(original ‖ quantized) in nats, averaged over calibration seeds; in brackets the range over seeds |
| KL p99 | 99th percentile over tokens |
| perplexity ratio | perplexity over the original's |
| top-1 | share of positions at which both models rank the same token first |
| bits per weight | mean over the quantized linears, scales and zero-points included |
| CPU s | processor time of the quantizing process on one thread (where it was more, the processor's column says so), with start and imports; other work beside it makes it longer (GPTQ of SmolLM2: 178, and 92 in another run), so it compares tools roughly |
| GB | its peak resident memory |
| processor | what the seconds are of, and the most telling of its instruction sets; – where that was not recorded. Where only some seeds have one, seconds and memory are theirs. Seconds of two processors do not compare |

| tool | what was run |
|---|---|
| llmquant best | recipe `best-w4g128` with the scheme of the table; "2 bits" is `best-w2g32` |
| llmquant best with awq | `--recipe best-w4g128 --method awq+gptq+tune`: channels scaled first; at W4 g32 asym the recipe `best-w4g32-asym` |
| llmquant qat | recipe `qat-w4g128`, `qat-w3g128` or `qat-w2g32`: the same, then 48 steps of training on the whole calibration text, not only its windows |
| llmquant gptq; rotated | `--rotate`, which at W4 g128 and at W4 g32 asym are the recipes `rotate-gptq-w4g128` and `rotate-gptq-w4g32-asym`: folded into the weights; a tied head is a tensor of its own then (SmolLM2 at W4 g64: 170 MB instead of 113) |
| llmquant awq+gptq; rotated | recipe `awq-gptq-w4g32-asym` with `--rotate` |
| llmquant best; rotated | recipe `rotate-best-w4g128` with the scheme of the table; first tokens count as 1/64. Qwen's seconds are of two processes: it was stopped once and resumed |
| llmquant gptq; mixed within the same size | `--target-bpw`: each linear has its own width, the size of the folder is the same; on tiny-llama with 8192 probe tokens, which was the default |
| llm-compressor | 0.14.0.1, its GPTQ, AWQ and round-to-nearest |
| autoround 200, autoround 40 | AutoRound 0.15.1 with its default of 200 iterations; with 40 |
| gptqmodel gptq | GPTQModel 7.6.0 with its default, group-aware act-order; without it where a group is a row, which it refuses there |

The small models are calibrated on 160 TinyStories and evaluated on 157 others. Both models are float32, and most tools store
float32 scales for them. stories260K has linears with 172 rows or columns, which no usual group size divides. AutoRound leaves
these unquantized, so it has no row there."""
_COLUMNS = """| tool | KL | KL p99 | perplexity ratio | top-1 | bits per weight | CPU s | GB | processor | seeds |
|---|---|---|---|---|---|---|---|---|---|"""
