"""Write `gptqmodel-*/`: checkpoints that GPTQModel's quantizer made of one layer of `base/`, and
what it reads in them.

Run it in an environment that has GPTQModel; README.md says which version. `expected.safetensors`
holds what its torch kernel dequantizes after its own loader has read the folder (and turned v1 zero
points into v2 ones). GPTQModel also writes a folder `logs/` where it is run: run it from outside
the repository.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault(
    "GPTQMODEL_CPU_WORKERS", "2"
)  # its default for two cores is one, which its own pool then refuses

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from make_base import CONFIG, first_layers
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
CASES = {
    "w4-v1-sym": {"bits": 4, "group_size": 32, "sym": True, "format": "gptq"},
    "w4-v1-asym": {"bits": 4, "group_size": 32, "sym": False, "format": "gptq"},
    "w4-v2-asym": {"bits": 4, "group_size": 32, "sym": False, "format": "gptq_v2"},
    "w4-v1-desc_act-sym": {
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "format": "gptq",
        "desc_act": True,
    },
    "w4-v2-desc_act-asym": {
        "bits": 4,
        "group_size": 32,
        "sym": False,
        "format": "gptq_v2",
        "desc_act": True,
    },
    "w3-v1-asym": {"bits": 3, "group_size": 32, "sym": False, "format": "gptq"},
    "w2-v2-sym": {"bits": 2, "group_size": 32, "sym": True, "format": "gptq_v2"},
    "w8-v1-row-asym": {"bits": 8, "group_size": -1, "sym": False, "format": "gptq"},
}


def calibration() -> list[dict]:
    ids = torch.randint(3, CONFIG.vocab_size, (16, 64), generator=torch.Generator().manual_seed(7))
    return [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()]


def write(options: dict, out: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        base = first_layers(1, Path(scratch) / "base")
        # act_group_aware is its other order of columns, on by default: for groups only, and not
        # together with desc_act
        desc_act = options.get("desc_act", False)
        group_aware = not desc_act and options["group_size"] > 0
        config = QuantizeConfig(
            **{**options, "desc_act": desc_act},
            act_group_aware=group_aware,
            device="cpu",
            offload_to_disk=False,
        )
        model = GPTQModel.load(str(base), config, dtype=torch.float16)
        model.quantize(calibration(), batch_size=1)
        result = Path(scratch) / "result"
        model.save(str(result))
        out.mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(result / name, out / name)
        save_file(expected(result), out / "expected.safetensors")


def expected(result: Path) -> dict[str, torch.Tensor]:
    model = GPTQModel.load(
        str(result), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16
    )
    return {  # the class's own method: the instance's is compiled
        f"{name}.weight": TorchLinear.dequantize_weight(module).T.contiguous()
        for name, module in model.model.named_modules()
        if isinstance(module, TorchLinear)
    }


def main() -> None:
    for case in sys.argv[1:] or CASES:
        write(CASES[case], HERE / f"gptqmodel-{case}")


if __name__ == "__main__":
    main()
