"""The real builder and ONNX Runtime as judges of exports. They live in an environment of their own
(``make onnx-env``, or ``LLMQUANT_ONNX_PYTHON``).

At accuracy level 0 logits must be the folder's but for rounding in float32: 1e-4 of the largest
(measured: 1e-6 to 2e-6).
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from children import Run

import llmquant
from llmquant.checkpoint.weights.exported import DATA, MODEL
from llmquant.conversion.onnx.environment import find_onnx
from llmquant.conversion.onnx.proving.graph import read_graph
from llmquant.conversion.onnx.proving.numbers import packed_numbers_of
from llmquant.conversion.onnx.proving.proof import prove
from llmquant.conversion.onnx.source import ARCHITECTURES, plan
from llmquant.conversion.source import open_source
from llmquant.errors import ProofError
from llmquant_serve.engines.base import Sampling, Step
from llmquant_serve.engines.onnx.engine import onnx_engine
from llmquant_serve.engines.options import ModelOptions

pytestmark = pytest.mark.onnx

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "tiny-llama"
PYTHON = Path(os.environ.get("LLMQUANT_ONNX_PYTHON", ROOT / ".venv-onnx" / "bin" / "python"))
TOLERANCE = 1e-4
SCHEMES = {
    "w4 g32 asym": ("--group-size", "32", "--asym"),
    "w4 g64 sym": ("--group-size", "64"),
    "w8 g128 asym": ("--bits", "8", "--group-size", "128", "--asym"),
}
PROMPT = "The river"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PYTHON.is_file(), "make onnx-env"
    monkeypatch.setenv("LLMQUANT_ONNX_PYTHON", str(PYTHON))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx")


@pytest.fixture(scope="module")
def packed(folders: Path) -> Path:
    recipe = {"method": "rtn", "weights": {"group_size": 32}}
    llmquant.quantize(EXAMPLE, folders / "packed", llmquant.Recipe.model_validate(recipe))
    return folders / "packed"


@pytest.fixture(scope="module")
def exported(packed: Path, folders: Path) -> Path:
    options = llmquant.OnnxOptions(python=PYTHON)
    llmquant.export_onnx(packed, folders / "exported", options)
    return folders / "exported"


def test_the_builder_has_the_architectures() -> None:
    code = "import onnxruntime_genai.models as m; print(m.__path__[0])"
    done = subprocess.run([PYTHON, "-I", "-c", code], capture_output=True, text=True, check=True)
    source = (Path(done.stdout.strip()) / "builder.py").read_text(encoding="utf-8")
    assert [a for a in ARCHITECTURES if f'"{a}"' not in source] == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_packed_linears_are_the_folders(scheme: str, run: Run, tmp_path: Path) -> None:
    quantized = run("quantize", EXAMPLE, "-o", "packed", "--method", "rtn", *SCHEMES[scheme])
    assert quantized.code == 0, quantized.err
    done = run("export", "packed", "--to", "onnx", "-o", "out", "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert (len(facts["nodes"]), facts["altered"], facts["requantized"]) == (42, {}, {})
    assert facts["check"]["max_difference"] < TOLERANCE * facts["check"]["largest_logit"]
    assert run("verify", "out").code == 0


def test_one_flipped_bit_is_found(packed: Path, exported: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(exported, tmp_path / "damaged"))
    source = open_source(packed, None)
    numbers = packed_numbers_of(source, plan(source, torch.float32), torch.float32, "fp16")
    graph = read_graph(find_onnx(), damaged / MODEL)
    prove(graph, numbers, lambda *_: None)
    place = graph.initializers["model.layers.4.mlp.up_proj.MatMulNBits.qweight"]
    data = bytearray((damaged / DATA).read_bytes())
    data[place.offset + 77] ^= 0x10
    (damaged / DATA).write_bytes(data)
    with pytest.raises(ProofError, match=r"the codes of model\.layers\.4\.mlp\.up_proj: 1 of"):
        prove(graph, numbers, lambda *_: None)


def test_level_4_and_a_rounded_head_are_measured(packed: Path, run: Run) -> None:
    common = ("export", packed, "--to", "onnx", "-o", "out", "--json")
    done = run(*common, "--accuracy-level", "4", "--head", "int8")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert list(facts["requantized"].values()) == ["int8, groups of 32"]
    assert 1e-7 < facts["check"]["kl_mean"] < 0.05


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_float_folders(weights: str, run: Run) -> None:
    common = ("export", EXAMPLE, "--to", "onnx", "-o", "out", "--json")
    done = run(*common, "--weights", weights)
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    if weights == "fp32":
        assert facts["requantized"] == {}
        assert facts["check"]["max_difference"] < TOLERANCE * facts["check"]["largest_logit"]
    else:
        assert len(facts["requantized"]) == 30
        assert facts["check"]["kl_mean"] < 0.1


def test_a_w8a8_folder_keeps_its_codes(run: Run, tmp_path: Path) -> None:
    text = ("--calibration", f"file:{EXAMPLE / 'calibration.txt'}")
    size = ("--nsamples", "4", "--seqlen", "128")
    quantized = run("quantize", EXAMPLE, "-o", "w8a8", "--recipe", "w8a8", *text, *size)
    assert quantized.code == 0, quantized.err
    done = run("export", "w8a8", "--to", "onnx", "-o", "out", "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert (facts["weights"], facts["requantized"], len(facts["nodes"])) == ("int8", {}, 42)
    assert facts["check"]["kl_mean"] < 0.1


def test_greedy_text_is_the_folders(packed: Path, exported: Path) -> None:
    tokenizer = llmquant.load_tokenizer(packed)
    ids = tokenizer(PROMPT)["input_ids"]
    model = llmquant.load(packed, dtype="float32")
    with torch.inference_mode():
        prompt = torch.tensor([ids])
        mask = torch.ones_like(prompt)
        out = model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=24)
    wanted = out[0, len(ids) :].tolist()
    assert asyncio.run(_greedy(exported, ids, len(wanted))) == wanted


async def _greedy(folder: Path, ids: list[int], count: int) -> list[int]:
    """Two requests at once, the same tokens each; log-probabilities of the prompt by the way."""
    engine = onnx_engine(ModelOptions(model=str(folder), engine="onnx", threads=1), 2)
    await engine.start()
    try:

        async def one(sampling: Sampling) -> list[Step]:
            return [step async for step in engine.generate(ids, sampling)]

        plain = Sampling(max_tokens=count, temperature=0.0)
        scored = Sampling(max_tokens=count, temperature=0.0, logprobs=1, prompt_logprobs=1)
        first, second = await asyncio.gather(one(plain), one(scored))
        assert engine.health().ok
        tokens = [[t.id for step in steps for t in step.tokens] for steps in (first, second)]
        assert tokens[0] == tokens[1]
        prompt = next(step.prompt for step in second if step.prompt is not None)
        assert [t.id for t in prompt] == ids
        assert all(t.logprob is not None and t.logprob <= 0 for t in prompt[1:])
        return tokens[0]
    finally:
        await engine.close()


def test_it_is_evaluated_like_any_model(packed: Path, exported: Path, run: Run) -> None:
    text = f"file:{EXAMPLE / 'heldout.txt'}"
    common = ("--text", text, "--window", "128", "--max-windows", "4", "--dtype", "float32")
    done = run("eval", exported, "--reference", packed, *common, "--no-noise-floor", "--json")
    assert done.code == 0, done.err
    export = next(m for m in json.loads(done.out)["models"] if m["role"] == "candidate")
    assert export["metrics"]["kl_mean"]["value"] < 1e-8
    assert export["metrics"]["top1_agreement"]["value"] == 1.0
    assert export["cost"]["decode_tokens_per_second"] > 0
    assert export["scheme"] == "W4 g32 sym, ONNX cpu, accuracy level 0"


def test_genai_reads_the_tokenizer(exported: Path) -> None:
    """It adds no BOS token itself."""
    text = (EXAMPLE / "heldout.txt").read_text(encoding="utf-8")[:400]
    code = (
        "import sys, json, onnxruntime_genai as og; folder, text = sys.argv[1:]\n"
        "t = og.Tokenizer(og.Model(folder))\n"
        "print(json.dumps([t.bos_token_id, *map(int, t.encode(text))]))"
    )
    done = subprocess.run(
        [PYTHON, "-I", "-c", code, exported, text], capture_output=True, text=True, check=True
    )
    ids = llmquant.load_tokenizer(exported)(text)["input_ids"]
    assert json.loads(done.stdout.splitlines()[-1]) == ids


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    llmquant.set_threads(1)
    yield
    llmquant.set_threads(before)
