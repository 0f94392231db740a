"""Write `autoawq-*/`: what AutoAWQ's quantizer made of one layer of `base/`, and what AutoAWQ reads
in it.

Run it in an environment that has AutoAWQ; README.md says which version. `expected.safetensors`
holds what its `dequantize_gemm` makes of the saved tensors.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import torch
from awq import AutoAWQForCausalLM
from awq.utils.packing_utils import dequantize_gemm
from make_base import CONFIG, first_layers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
CASES = {"w4-asym": {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}}


def write(options: dict, out: Path) -> None:
    ids = torch.randint(
        3, CONFIG.vocab_size, (16, 64), generator=torch.Generator().manual_seed(7)
    ).tolist()
    with tempfile.TemporaryDirectory() as scratch:
        base = first_layers(1, Path(scratch) / "base")
        model = AutoAWQForCausalLM.from_pretrained(
            str(base), torch_dtype=torch.float16, device_map="cpu"
        )
        # no clip search: it wants a multiple of 64 output rows, and k_proj and v_proj have 32
        model.quantize(
            None, quant_config=options, calib_data=ids, max_calib_seq_len=64, apply_clip=False
        )
        result = Path(scratch) / "result"
        model.save_quantized(str(result))
        out.mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(result / name, out / name)


def expected(options: dict, out: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(out / "model.safetensors")
    weights = {}
    for key in tensors:
        module = key.removesuffix(".qweight")
        if module != key:
            qweight, qzeros, scales = (
                tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales")
            )
            weight = dequantize_gemm(
                qweight, qzeros, scales, options["w_bit"], options["q_group_size"]
            )
            weights[f"{module}.weight"] = weight.T.contiguous()
    return weights


def main() -> None:
    for case in sys.argv[1:] or CASES:
        out = HERE / f"autoawq-{case}"
        write(CASES[case], out)
        save_file(expected(CASES[case], out), out / "expected.safetensors")


if __name__ == "__main__":
    main()
