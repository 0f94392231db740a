"""The real vLLM as judge of what we write. It lives in an environment of its own (``make
vllm-env``) and runs as a subprocess.

For every row that the engine table says it takes, the top-20 prompt log-probabilities in vLLM at
float16 must equal those of ``llmquant.load`` within 0.05 (rounding alone gives about 0.03, a wrong
layout gives whole units; int8 activations are rounded by different kernels and get the bound
measured for them). For every row it says vLLM refuses, vLLM must refuse: the table may not be more
timid than the engine.

Every row is asked for both kinds of CPU that the table has. A CPU with AVX-512 can be both: without
AVX-512 vLLM loads another library of kernels, and ``probe.py`` has it do so. A CPU without AVX-512
can only be itself; the rows that were not run for the other kind are listed at the end of pytest's
output (``conftest.py``).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from probe import ENVIRONMENT, job_line
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from wholes import PROCESSORS, WHOLES, random_whole

from llmquant import QuantizeOptions, load, quantize
from llmquant.checkpoint.detect import quantization_config
from llmquant.checkpoint.packed import PackedCheckpoint
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.conversion import convert
from llmquant.formats.engines import VLLM_AVX512, VLLM_NO_AVX512, refusals, vllm_here
from llmquant.formats.rules import Beside
from llmquant.recipe import Recipe

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny-llama"
PYTHON = Path(os.environ.get("LLMQUANT_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
RESULTS = Path(__file__).parent / "results.json"
# Kinds of CPU: what probe.py calls them, and the engine table.
CPUS = {"avx512": VLLM_AVX512, "no-avx512": VLLM_NO_AVX512}
HERE = {VLLM_AVX512: ("avx512", "no-avx512"), VLLM_NO_AVX512: ("no-avx512",)}.get(
    vllm_here() or "", ()
)
# What the engine's error says where the table's reason has these words.
ERRORS = {
    "4-bit weights need AVX-512": "has no attribute 'cpu_gemm_wna16'",
    "experts need AVX-512": "MoE backend supports the deployment configuration",
}
SECONDS = 240
BOUND = 0.05
BOUND_INT8 = 0.5
BOUND_OVERFLOWING = 1.5
BOUND_BFLOAT16 = 0.5
BOUND_FLOAT32 = 1e-3
PROMPTS = (
    "The river runs through the town and",
    "In 1983 the team represented",
    "She opened the door, and there stood",
    "The album was released in",
    "He was born in",
    "What is the sum of 12 and 30?",
    "The castle on the hill",
    "It was the best of times, it was the worst of",
)


@dataclass(frozen=True)
class Row:
    """A recipe, and the dtype and bound of its comparison; ``dense`` to convert what it gives to a
    dense checkpoint, ``only`` for one kind of CPU."""

    name: str
    changes: dict[str, Any]
    bound: float = BOUND
    dtype: str = "float16"
    model: str = "tiny"
    dense: bool = False
    only: str | None = None

    def bound_on(self, cpu: str) -> float:
        """Without AVX-512 int8 sums overflow: see the cautions of the engine table."""
        return BOUND_OVERFLOWING if cpu == "no-avx512" and self.bound == BOUND_INT8 else self.bound


def grid(
    bits: int = 4, group: int = 128, *, sym: bool = True, layout: str = "compressed-tensors"
) -> dict[str, Any]:
    return {
        "weights.bits": bits,
        "weights.group_size": group,
        "weights.symmetric": sym,
        "format": layout,
    }


GROUPS = {"g16": 16, "g32": 32, "g64": 64, "g128": 128, "row": -1}
INT8 = {**grid(8, -1), "weights.activations": "int8-dynamic"}
# Loaded with AMX, by hand; what they give there was not compared, so there are no bounds to hold
# them to.
EXPERTS = [
    *(
        Row(
            f"{layout}-experts",
            {**grid(group=32, layout=layout), "include": ("*.experts.*",)},
            model="mixtral",
            only="no-avx512",
        )
        for layout in ("gptq", "awq")
    ),
    Row(
        "ct-w8a8-experts", {**INT8, "include": ("*.experts.*",)}, model="mixtral", only="no-avx512"
    ),
]
TAKEN = [
    Row("dense", grid(), dense=True),
    Row("dense-bfloat16", grid(), BOUND_BFLOAT16, "bfloat16", dense=True),
    Row("dense-float32", grid(), BOUND_FLOAT32, "float32", dense=True),
    *(
        Row(f"ct-w4-{s}-{g}", grid(group=n, sym=s == "sym"))
        for g, n in GROUPS.items()
        for s in ("sym", "asym")
    ),
    Row("ct-mixed-groups", {**grid(), "overrides": ({"match": "*.mlp.*", "group_size": 32},)}),
    Row("ct-ignore", {**grid(), "ignore": ("lm_head", "model.layers.0.*")}),
    *(Row(f"gptq-v1-sym-{g}", grid(group=n, layout="gptq")) for g, n in GROUPS.items() if n != 16),
    Row("gptq-v2-sym-g32", grid(group=32, layout="gptq_v2")),
    Row(
        "gptq-dynamic",
        {
            **grid(layout="gptq"),
            "overrides": ({"match": "*.mlp.*", "group_size": 32},),
            "ignore": ("lm_head", "model.layers.1.*"),
        },
    ),
    *(
        Row(f"awq-{s}-{g}", grid(group=n, sym=s == "sym", layout="awq"))
        for g, n in GROUPS.items()
        for s in ("sym", "asym")
        if n in (16, 32, 128)
    ),
    Row("awq-ignore", {**grid(layout="awq"), "ignore": ("lm_head", "model.layers.1.*")}),
    *(
        Row(f"{layout}-quantized-head", {**grid(layout=layout), "ignore": ()}, model="untied")
        for layout in ("compressed-tensors", "gptq", "awq")
    ),
    *(
        Row(f"{layout}-biases", grid(layout=layout), model="qwen2")
        for layout in ("compressed-tensors", "gptq", "awq")
    ),
    *(
        Row(f"{layout}-gpt_neox", grid(layout=layout), model="gpt_neox")
        for layout in ("compressed-tensors", "gptq", "awq")
    ),
    *(
        Row(f"ct-{kind}", changes, bound, dtype, model=kind, only="avx512")
        for kind, changes, bound, dtype in (
            # vLLM has no code of its own for it and runs transformers'.
            ("persimmon", grid(group=32), BOUND, "float16"),
            # vLLM refuses float16 for it.
            ("gemma3", grid(group=32), BOUND_BFLOAT16, "bfloat16"),
            *(
                (k, grid(group=32), BOUND, "float16")
                for k in ("qwen2_5_vl", "qwen3_vl", "mistral3", "mllama")
            ),
            ("llama4", {**grid(group=32), "ignore": ("lm_head", "*.experts.*")}, BOUND, "float16"),
        )
    ),
    # At float16 this build's int8 kernel aborts ("scale_C: scalar path not implemented"), so int8
    # is compared at bfloat16.
    *EXPERTS,
    Row("ct-w8a8", INT8, BOUND_INT8, "bfloat16"),
    Row(
        "ct-w4-and-w8a8",
        {
            **INT8,
            "overrides": (
                {"match": "*.mlp.*", "bits": 4, "group_size": 128, "activations": "none"},
            ),
        },
        BOUND_INT8,
        "bfloat16",
    ),
    # What an allocation gives: schemes that differ from linear to linear, some linears left at 16
    # bits.
    Row(
        "ct-mixed-4-16",
        {
            **grid(),
            "ignore": ("lm_head", "model.layers.1.self_attn.*", "model.layers.2.mlp.down_proj"),
            "overrides": (
                {"match": "model.layers.0.mlp.*", "group_size": 32, "symmetric": False},
                {"match": "*.o_proj", "group_size": 64},
                {"match": "*.layers.3.*", "group_size": -1},
            ),
        },
    ),
    Row(
        "ct-mixed-4-8-16",
        {
            **INT8,
            "ignore": ("lm_head", "model.layers.1.self_attn.*", "model.layers.2.mlp.down_proj"),
            "overrides": (
                {"match": "*.layers.0.mlp.*", "bits": 4, "group_size": 32, "activations": "none"},
                {
                    "match": "*.o_proj",
                    "bits": 4,
                    "group_size": 64,
                    "symmetric": False,
                    "activations": "none",
                },
            ),
        },
        BOUND_INT8,
        "bfloat16",
    ),
]
BY_GROUP = {"method": "gptq", "gptq.act_order": "group"}
REFUSED = [
    Row("ct-w8a16", grid(8)),
    Row("ct-w2", grid(2, 32)),
    Row("ct-w3", grid(3)),
    Row("ct-g_idx", {**grid(), **BY_GROUP}),
    Row("gptq-asym", grid(sym=False, layout="gptq_v2")),
    Row("gptq-w8", grid(8, layout="gptq")),
    Row("gptq-g16", grid(group=16, layout="gptq")),
    *(Row(f"ct-{kind}", grid(group=32), model=kind) for kind in ("mixtral", "qwen3_moe")),
    # The unquantized ones fail there too.
    *(Row(f"ct-{kind}", grid(group=32), model=kind) for kind in ("lfm2", "qwen3_5_text")),
    *(
        Row(f"ct-{kind}", grid(group=32), model=kind, only="avx512")
        for kind in ("gpt_neo", "biogpt")
    ),
    Row("gptq-desc_act", {**grid(layout="gptq"), **BY_GROUP}),
]


@pytest.fixture(scope="session", autouse=True)
def _vllm_is_there() -> None:
    if PYTHON.is_file():
        return
    message = f"no vLLM environment at {PYTHON}: run `make vllm-env` or set LLMQUANT_VLLM_PYTHON"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def results() -> Iterator[dict[str, Any]]:
    """Collects what was measured, by kind of CPU; LLMQUANT_WRITE_RESULTS=1 keeps it for
    docs/formats.md, of a run in one process (``pytest -m vllm``).

    Rows of a kind that was not run here stay as they were measured elsewhere.
    """
    rows: dict[str, Any] = {cpu: {} for cpu in CPUS}
    yield rows
    if os.environ.get("LLMQUANT_WRITE_RESULTS") and any(rows.values()):
        known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
        kept = {cpu: {**known.get(cpu, {}), **rows[cpu]} for cpu in CPUS}
        RESULTS.write_text(
            f"{json.dumps({'vllm': '0.32.0 CPU', **kept}, indent=1)}\n", encoding="utf-8"
        )


def written(row: Row, folder: Path) -> Path:
    calibration = {
        "calibration.source": f"file:{MODEL / 'calibration.txt'}",
        "calibration.nsamples": 4,
        "calibration.seqlen": 128,
    }
    needs_text = row.changes.get("method") == "gptq"
    recipe = Recipe(method="rtn").updated({**(calibration if needs_text else {}), **row.changes})
    model = MODELS[row.model](folder / "model")
    quantize(model, folder / row.name, recipe, QuantizeOptions())
    if row.dense:
        convert(folder / row.name, "dense", folder / f"{row.name}-converted")
        return folder / f"{row.name}-converted"
    return folder / row.name


def tiny(_: Path) -> Path:
    return MODEL


def untied(folder: Path) -> Path:
    """tiny-llama with a head of its own, equal to the embeddings."""
    model = AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float16, tie_word_embeddings=False
    )
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    return saved(model, folder)


def qwen2(folder: Path) -> Path:
    """A random Qwen2, whose q, k and v have biases."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    return saved(model.to(torch.float16), folder)


def of_type(kind: str, **more: Any) -> Callable[[Path], Path]:
    """Makes a random model of another type."""

    def make(folder: Path) -> Path:
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            kind,
            vocab_size=4096,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings=False,
            initializer_range=0.1,
            max_position_embeddings=512,
            **more,
        )
        return saved(AutoModelForCausalLM.from_config(config, dtype=torch.float16), folder)

    return make


def whole(kind: str) -> Callable[[Path], Path]:
    """Makes a random model that also sees."""

    def make(folder: Path) -> Path:
        saved(random_whole(kind), folder)
        if kind in PROCESSORS:
            file = folder / "preprocessor_config.json"
            file.write_text(json.dumps(PROCESSORS[kind]), encoding="utf-8")
        return folder

    return make


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


MODELS = {
    "tiny": tiny,
    "untied": untied,
    "qwen2": qwen2,
    "gpt_neox": of_type("gpt_neox"),
    "mixtral": of_type("mixtral", num_key_value_heads=2, num_local_experts=4),
    "qwen3_moe": of_type(
        "qwen3_moe",
        num_key_value_heads=2,
        head_dim=64,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
    ),
    "lfm2": of_type("lfm2", num_key_value_heads=2, layer_types=["conv", "full_attention"]),
    "qwen3_5_text": of_type(
        "qwen3_5_text",
        num_key_value_heads=2,
        head_dim=64,
        layer_types=["linear_attention", "full_attention"],
    ),
    "persimmon": of_type("persimmon"),
    "gpt_neo": of_type("gpt_neo", num_layers=2, attention_types=[[["global", "local"], 1]]),
    "biogpt": of_type("biogpt"),
    **{kind: whole(kind) for kind in WHOLES},
}


def prompt_ids() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return [tokenizer(p)["input_ids"] for p in PROMPTS]


@dataclass(frozen=True)
class Judged:
    """What vLLM made of a model: the exit code of the process, what it printed, and the prompts'
    top log-probabilities."""

    code: int
    printed: str
    told: list[list[dict[str, float]]] | None


class Judge:
    """vLLM in a process of its own that was told which kind of CPU to be; see ``probe.py``."""

    def __init__(self, cpu: str, folder: Path) -> None:
        held = "no-avx512" if cpu == "no-avx512" else "as-it-is"
        self._folder, self._errors = folder, folder / "errors.log"
        command = [str(PYTHON), str(Path(__file__).parent / "probe.py"), held]
        with self._errors.open("wb") as sink:
            self._process = subprocess.Popen(
                command,
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                text=True,
            )

    def __call__(
        self, model: Path, dtype: str, prompts: list[list[int]], *, sees: bool = False
    ) -> Judged:
        result, log = self._folder / "result.json", self._folder / "job.log"
        result.unlink(missing_ok=True)
        job = job_line(model, dtype, prompts, sees=sees, result=result, log=log, seconds=SECONDS)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(job)
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, self._errors.read_text(errors="replace")[-2000:]
        told = json.loads(result.read_text(encoding="utf-8")) if int(answer) == 0 else None
        return Judged(int(answer), log.read_text(errors="replace"), told)

    def close(self) -> None:
        self._process.communicate(timeout=60)


@pytest.fixture(scope="session")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Judge]]:
    """One vLLM for each kind of CPU, started when it is first asked for."""
    started: dict[str, Judge] = {}

    def judge(cpu: str) -> Judge:
        if cpu not in started:
            started[cpu] = Judge(cpu, tmp_path_factory.mktemp(cpu))
        return started[cpu]

    yield judge
    for running in started.values():
        running.close()


@pytest.fixture(params=CPUS)
def cpu(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> str:
    """A kind of CPU that this machine can be; the row is recorded as not run for one that it
    cannot."""
    kind, row = str(request.param), request.node.callspec.params["row"]
    if kind not in HERE or row.only not in (None, kind):
        not_run(record_property, kind, row.name)
    return kind


def not_run(record_property: Callable[[str, object], None], kind: str, row: str) -> NoReturn:
    record_property("not run", f"{CPUS[kind]}: {row}")
    pytest.skip(f"not run for {CPUS[kind]}; the row is listed at the end")


def environment() -> dict[str, str]:
    return {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OMP_NUM_THREADS")
    } | ENVIRONMENT


def table_says(folder: Path, cpu: str) -> list[str]:
    reader = CheckpointReader(folder)
    if quantization_config(reader) is None:
        return []
    packed = PackedCheckpoint(reader)
    model = Beside.of(reader.config, ())
    return refusals(packed.layout.name, packed.schemes, model)[CPUS[cpu]]


@pytest.mark.parametrize("row", TAKEN, ids=lambda r: r.name)
def test_vllm_computes_our_numbers(
    row: Row, cpu: str, tmp_path: Path, results: dict[str, Any], judges: Callable[[str], Judge]
) -> None:
    """With AVX-512 every row; without it those that the table lets through, and of the others the
    refusal that it names."""
    folder = written(row, tmp_path)
    reasons = table_says(folder, cpu)
    prompts = prompt_ids()
    judged = judges(cpu)(folder, row.dtype, prompts, sees=row.model in WHOLES)
    if reasons:
        assert cpu == "no-avx512", reasons
        errors = [
            error for words, error in ERRORS.items() if any(words in reason for reason in reasons)
        ]
        assert len(errors) == len(reasons), reasons
        assert judged.code > 0, f"vLLM takes it after all: {judged.told}"
        assert any(error in judged.printed for error in errors), judged.printed[-2000:]
        results[cpu][row.name] = {"refused": reasons[0]}
        return
    assert judged.told is not None, judged.printed[-2000:]
    model = load(folder, dtype="float32", kernel="dense")
    worst, same, positions = 0.0, 0, 0
    for ids, told in zip(prompts, judged.told, strict=True):
        with torch.no_grad():
            ours = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
        for position, top in enumerate(told):
            worst = max(
                worst, *(abs(p - float(ours[position, int(token)])) for token, p in top.items())
            )
            same += int(ours[position].argmax()) == int(max(top, key=lambda t: top[t]))
            positions += 1
    results[cpu][row.name] = {
        "dtype": row.dtype,
        "max_abs_delta": round(worst, 4),
        "same_top1": same,
        "positions": positions,
    }
    print(f"{row.name}: max |Δ| {worst:.4f}, top-1 {same}/{positions}")
    assert worst <= row.bound_on(cpu)
    # Differences this small can only swap tokens that are nearly tied; the random model's often
    # are.
    assert same >= 0.9 * positions


@pytest.mark.parametrize("row", REFUSED, ids=lambda r: r.name)
def test_vllm_refuses_what_the_table_says(
    row: Row, cpu: str, tmp_path: Path, judges: Callable[[str], Judge]
) -> None:
    folder = written(row, tmp_path)
    assert table_says(folder, cpu), "the table lets this through"
    judged = judges(cpu)(folder, row.dtype, prompt_ids()[:1])
    assert judged.code not in (0, -signal.SIGALRM), f"vLLM takes it after all: {judged.told}"


SERVED = [
    *(Row(layout, grid(layout=layout)) for layout in ("compressed-tensors", "gptq", "awq")),
    Row("ct-w8a8", INT8, BOUND_INT8, "bfloat16"),
    Row("dense", grid(), dense=True),
]


@pytest.mark.parametrize("row", SERVED, ids=lambda r: r.name)
def test_greedy_text_over_the_api(
    row: Row, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """By this machine as it is: a server that refuses its model does not start, which is no other
    refusal than above."""
    folder = written(row, tmp_path)
    if not HERE or table_says(folder, HERE[0]):
        not_run(record_property, "avx512", f"{row.name} over the API")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        str(PYTHON),
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--enforce-eager",
        "--max-model-len",
        "512",
        "--dtype",
        row.dtype,
    ]
    surroundings = environment()
    surroundings.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
    log = tmp_path / "server.log"
    with log.open("wb") as sink:
        server = subprocess.Popen(command, env=surroundings, stdout=sink, stderr=sink)
    try:
        _until_ready(port, server, log)
        asked = {
            "model": str(folder),
            "prompt": PROMPTS[0],
            "max_tokens": 16,
            "temperature": 0,
            "return_token_ids": True,
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            theirs = json.load(response)
    finally:
        server.terminate()
        server.wait(30)
    agree_until_a_tie(
        folder, prompt_ids()[0], theirs["choices"][0]["token_ids"], row.bound_on(HERE[0])
    )


def agree_until_a_tie(folder: Path, prompt: list[int], theirs: list[int], bound: float) -> None:
    """Greedy tokens are the same; the first that differs must be a tie within the rounding between
    the engines."""
    model = load(folder, dtype="float32", kernel="dense")
    assert len(theirs) == 16
    with torch.no_grad():
        ours = torch.log_softmax(model(torch.tensor([prompt + theirs])).logits[0].float(), -1)
    for i, token in enumerate(theirs):
        row = ours[len(prompt) - 1 + i]
        best = int(row.argmax())
        if best != token:
            gap = float(row[best] - row[token])
            print(f"token {i} of 16 differs, {gap:.4f} behind the best")
            assert gap <= bound
            return


def _until_ready(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text(errors="replace")[-2000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"the server was not ready in 180 s: {log.read_text(errors='replace')[-2000:]}")
