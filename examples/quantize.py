"""Quantize the example model to 4 bits with GPTQ, look at the result, and let it write a sentence.

    python examples/quantize.py [OUTPUT]

OUTPUT is out/example-w4 unless given; a model folder that is there already is replaced. 16 windows
of 256 tokens keep it short; a real model wants 128 windows of 2048. Took 23 seconds on two cores.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import llmquant

MODEL = Path(__file__).resolve().parent / "tiny-llama"


def main() -> None:
    """Quantize, inspect, generate."""
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "out/example-w4")
    recipe = llmquant.load_recipe("gptq-w4g128").updated(
        {
            "calibration.source": f"file:{MODEL / 'calibration.txt'}",
            "calibration.nsamples": 16,
            "calibration.seqlen": 256,
        }
    )
    result = llmquant.quantize(MODEL, output, recipe, llmquant.QuantizeOptions(overwrite=True))
    print(
        f"{result.source_bytes / 1e6:.2f} MB became {result.bytes_written / 1e6:.2f} MB in {output}"
    )
    print(f"{len(result.modules)} linears, {result.bits_per_weight:.3f} bits per weight")
    worst = max(result.modules, key=lambda module: module.output_error or 0.0)
    print(f"largest relative output error: {worst.output_error:.1e}, {worst.name}")

    # Every engine that would refuse the folder says why, before anybody tries.
    for engine, reasons in llmquant.inspect(output).engines.items():
        print(f"{engine}: {'; '.join(reasons) or 'takes it'}")

    # A transformers model. Its linears stay packed in memory.
    model: Any = llmquant.load(output)
    print(f"kernels: {llmquant.describe(model).kernels}")
    tokenizer = AutoTokenizer.from_pretrained(output)
    prompt = tokenizer("The river", return_tensors="pt").input_ids
    tokens = model.generate(inputs=prompt, max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
