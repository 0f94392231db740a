"""Write `llmcompressor-*/`: checkpoints that llm-compressor made of `base/`, and what
compressed-tensors reads in them.

Run it in an environment that has llm-compressor; README.md says which version and how each file
came about. Under release 0.12 it writes `llmcompressor-0.12-*/` instead: what later releases refuse
(act-order with a group index) or pack in another way (3 bits: ten values a word then, a dense
stream of bits since). `expected.safetensors` holds, for every quantized linear, the weight that the
library's own decompressor yields.
"""

import json
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.utils.match import match_name
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from make_base import CONFIG, first_layers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent


def group(
    bits: int, size: int | None = 32, *, symmetric: bool = True, actorder: str | None = None
) -> dict:
    """The weights half of a scheme; no size means one scale per output row."""
    strategy = (
        {"strategy": "channel"} if size is None else {"strategy": "group", "group_size": size}
    )
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "actorder": actorder,
        **strategy,
    }


LINEAR = ["Linear"]
INT8_TOKENS = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "token",
    "dynamic": True,
}
# case -> (layers kept of the base, config groups)
CASES = {
    "w4-sym": (1, {"g": {"targets": LINEAR, "weights": group(4)}}),
    "w4-asym": (1, {"g": {"targets": LINEAR, "weights": group(4, symmetric=False)}}),
    "w8-sym": (1, {"g": {"targets": LINEAR, "weights": group(8)}}),
    "w8-asym": (1, {"g": {"targets": LINEAR, "weights": group(8, symmetric=False)}}),
    "w4-channel": (1, {"g": {"targets": LINEAR, "weights": group(4, None)}}),
    "w4-channel-asym": (1, {"g": {"targets": LINEAR, "weights": group(4, None, symmetric=False)}}),
    "w4-actorder-static": (1, {"g": {"targets": LINEAR, "weights": group(4, actorder="static")}}),
    "w3-asym": (1, {"g": {"targets": LINEAR, "weights": group(3, symmetric=False)}}),
    "w2-sym": (1, {"g": {"targets": LINEAR, "weights": group(2)}}),
    "w8a8": (
        1,
        {"g": {"targets": LINEAR, "weights": group(8, None), "input_activations": INT8_TOKENS}},
    ),
    "mixed": (
        1,
        {
            "mlp": {"targets": [r"re:.*mlp\..*_proj"], "weights": group(4)},
            "attention": {"targets": [r"re:.*self_attn\..*_proj"], "weights": group(8)},
        },
    ),
    "mixed-formats": (
        1,
        {
            "mlp": {"targets": [r"re:.*mlp\..*_proj"], "weights": group(4)},
            "attention": {
                "targets": [r"re:.*self_attn\..*_proj"],
                "weights": group(8, None),
                "input_activations": INT8_TOKENS,
            },
        },
    ),
}
OLD_CASES = {
    "w4-actorder-group": (1, {"g": {"targets": LINEAR, "weights": group(4, actorder="group")}}),
    "w3-asym": (1, {"g": {"targets": LINEAR, "weights": group(3, symmetric=False)}}),
}
OLD = version("llmcompressor").startswith("0.12.")


def calibration() -> Dataset:
    ids = torch.randint(3, CONFIG.vocab_size, (16, 64), generator=torch.Generator().manual_seed(7))
    return Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    )


def write(layers: int, groups: dict, out: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        # The tool writes the config.json of the folder that it loaded, so the layers are dropped
        # there, not in memory.
        base = first_layers(layers, Path(scratch) / "base")
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        actorder = next(iter(groups.values()))["weights"][
            "actorder"
        ]  # the tool insists that both places agree
        oneshot(
            model=model,
            processor=AutoTokenizer.from_pretrained(base),
            dataset=calibration(),
            num_calibration_samples=16,
            max_seq_length=64,
            recipe=GPTQModifier(config_groups=groups, ignore=["lm_head"], actorder=actorder),
        )
        result = Path(scratch) / "result"
        model.save_pretrained(result, save_compressed=True)
        out.mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(result / name, out / name)


def decompress(out: Path) -> dict[str, torch.Tensor]:
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    tensors = load_file(out / "model.safetensors")
    weights = {}
    for key in tensors:
        module = key.removesuffix(".weight_scale")
        if module == key:
            continue
        scheme = find_scheme(config, module)
        state = {
            name.removeprefix(f"{module}."): t
            for name, t in tensors.items()
            if name.startswith(f"{module}.")
        }
        compressor = BaseCompressor.get_value_from_registry(scheme.format or config["format"])
        weights[f"{module}.weight"] = compressor.decompress(state, scheme)["weight"].contiguous()
    return weights


def find_scheme(config: dict, module: str) -> QuantizationScheme:
    for entry in config["config_groups"].values():
        if any(target == "Linear" or match_name(module, target) for target in entry["targets"]):
            return QuantizationScheme(**entry)
    raise LookupError(f"no config group for {module}")


def main() -> None:
    cases, prefix = (OLD_CASES, "llmcompressor-0.12") if OLD else (CASES, "llmcompressor")
    for case in sys.argv[1:] or cases:
        out = HERE / f"{prefix}-{case}"
        write(*cases[case], out)
        save_file(decompress(out), out / "expected.safetensors")


if __name__ == "__main__":
    main()
