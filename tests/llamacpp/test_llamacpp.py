"""The real llama.cpp as judge of the GGUF files: it loads them, tokenizes as the folder does, and
its logits are the folder's but for the activations, which it rounds to int8 where weights are
quantized.

It lives in an environment of its own (``make llamacpp-env``, or ``LLMQUANT_LLAMACPP_PYTHON``).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from children import Run

import llmquant

pytestmark = pytest.mark.llamacpp

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny-llama"
PYTHON = Path(
    os.environ.get("LLMQUANT_LLAMACPP_PYTHON", ROOT / ".venv-llamacpp" / "bin" / "python")
)
# Mean KL in nats over 64 tokens of text. Measured: F16 4.2e-7, Q4_0 2.7e-4, Q8_0 2.3e-4 and 3.0e-4.
DENSE, PACKED = 5e-6, 1e-3
# What is quantized → the type that most linears get.
KINDS = {
    "dense": ((), "F16", DENSE),
    "w4 sym": (("--group-size", "32"), "Q4_0", PACKED),
    # A zero-point times a scale need not fit fp16: most of these tensors go into Q8_0, exactly.
    "w4 asym": (("--group-size", "64", "--asym"), "Q8_0", PACKED),
    "w8": (("--bits", "8", "--group-size", "128"), "Q8_0", PACKED),
}


@pytest.mark.parametrize(("options", "kind", "bound"), list(KINDS.values()), ids=list(KINDS))
def test_llama_cpp_computes_the_folder(
    options: tuple[str, ...], kind: str, bound: float, run: Run, tmp_path: Path
) -> None:
    assert PYTHON.is_file(), "make llamacpp-env"
    folder = MODEL
    if options:
        quantized = run("quantize", MODEL, "-o", "packed", "--method", "rtn", *options)
        assert quantized.code == 0, quantized.err
        folder = tmp_path / "packed"
    exported = run("export", folder, "--to", "gguf", "-o", "model.gguf", "--json")
    assert exported.code == 0, exported.err
    types = list(json.loads(exported.out)["types"].values())
    assert max(("F16", "Q4_0", "Q4_1", "Q8_0"), key=types.count) == kind

    text = (MODEL / "heldout.txt").read_text(encoding="utf-8")[:2000]
    tokenizer = llmquant.load_tokenizer(MODEL)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    (tmp_path / "ids.json").write_text(json.dumps(ids[:64]), encoding="utf-8")
    script = Path(__file__).with_name("probe.py")
    names = ("model.gguf", "ids.json", "text.txt", "out.npy")
    done = subprocess.run(
        [PYTHON, "-I", script, *names], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["tokens"] == ids
    assert said["template"] == (MODEL / "chat_template.jinja").read_text(encoding="utf-8")

    model = llmquant.load(folder, dtype="float32")
    with torch.inference_mode():
        ours = model(input_ids=torch.tensor([ids[:64]])).logits[0].double()
    theirs = torch.from_numpy(np.load(tmp_path / "out.npy")).double()
    p, q = torch.log_softmax(ours, -1), torch.log_softmax(theirs, -1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    print(f"{kind}: mean KL {kl:.2g} nats")
    assert kl < bound
