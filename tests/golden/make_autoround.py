"""Write `autoround-*/`: checkpoints that AutoRound exported of one layer of `base/`, and what
AutoRound reads in them.

Run it in an environment that has AutoRound; README.md says which version. Rounding is to nearest
(no tuning): only the bytes matter here. `expected.safetensors` holds what AutoRound's own CPU
layers compute from the saved tensors: the layer is applied to the identity matrix, which yields its
weight with no rounding of its own.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from auto_round import AutoRound
from auto_round.export.export_to_awq.utils import dequantize_gemm
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
from make_base import first_layers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
# case -> (export format, bits, symmetric, the shortcut that never loads the model)
CASES = {
    "auto_round-sym": ("auto_round", 4, True, False),
    "auto_round-asym": ("auto_round", 4, False, False),
    "auto_round-model-free-asym": ("auto_round", 4, False, True),
    "auto_round-w3-asym": ("auto_round", 3, False, False),
    "auto_gptq-sym": ("auto_gptq", 4, True, False),
    "auto_gptq-asym": ("auto_gptq", 4, False, False),
    "auto_awq-asym": ("auto_awq", 4, False, False),
}


def write(export: str, bits: int, symmetric: bool, model_free: bool, out: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        base = first_layers(1, Path(scratch) / "base")
        quantizer = AutoRound(
            str(base),
            bits=bits,
            group_size=32,
            sym=symmetric,
            iters=0,
            disable_opt_rtn=True,
            disable_model_free=not model_free,
            device_map="cpu",
        )
        quantizer.quantize_and_save(str(Path(scratch) / "result"), format=export)
        (config,) = (Path(scratch) / "result").rglob(
            "config.json"
        )  # some formats add a folder named after the scheme
        out.mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(config.with_name(name), out / name)


def dequantize(config: dict, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """The `[out, in]` weight of one module, by the class that AutoRound's inference picks for this
    packing format."""
    bits, size = config["bits"], config["group_size"]
    packing = config.get("packing_format", config["quant_method"])
    if packing.endswith("awq"):
        return dequantize_gemm(state["qweight"], state["qzeros"], state["scales"], bits, size).T
    minus_one = packing in ("auto_round:auto_gptq", "gptq")
    layer_class = (qlinear_torch_zp if minus_one else qlinear_torch).QuantLinear
    rows, columns = state["scales"].shape[1], state["qweight"].shape[0] * 32 // bits
    layer = layer_class(bits, size, columns, rows, bias=False)
    # AutoRound's inference, too, leaves the group index out: it is trivial, and the branch for it
    # fails where out > in.
    layer.load_state_dict({name: t for name, t in state.items() if name != "g_idx"})
    return layer(torch.eye(columns, dtype=torch.float16)).T


def expected(out: Path) -> dict[str, torch.Tensor]:
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    tensors = load_file(out / "model.safetensors")
    weights = {}
    for key in tensors:
        if key.endswith(".qweight"):
            module = key.removesuffix(".qweight")
            state = {
                name.removeprefix(f"{module}."): t
                for name, t in tensors.items()
                if name.startswith(f"{module}.")
            }
            weights[f"{module}.weight"] = dequantize(config, state).contiguous()
    return weights


def main() -> None:
    for case in sys.argv[1:] or CASES:
        out = HERE / f"autoround-{case}"
        write(*CASES[case], out)
        save_file(expected(out), out / "expected.safetensors")


if __name__ == "__main__":  # AutoRound starts processes that import this file
    main()
