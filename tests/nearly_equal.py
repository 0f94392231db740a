"""Two folders of packed weights that were computed by the same arithmetic, whose sums may have been
taken in another order: on a device composite operators arrive in parts, and matrix libraries sum
matrices of other shapes in other orders."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

# Of a tensor's bytes. A rounding that falls to the other side changes a code; that was at most
# 0.3 % (block tuning; the other methods none or less). A wrong number anywhere changes most.
OTHER = 0.02


def check_nearly_equal(first: Path, second: Path) -> None:
    """Tensors of the same names, types and shapes, nearly all of whose bytes are equal."""
    one, two = ({k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}
                for folder in (first, second))  # fmt: skip
    assert {k: (v.dtype, v.shape) for k, v in one.items()} == {
        k: (v.dtype, v.shape) for k, v in two.items()
    }
    for name, tensor in one.items():
        pair = (t.reshape(-1).view(torch.uint8) for t in (tensor, two[name]))
        unlike = float(torch.ne(*pair).float().mean())
        assert unlike <= OTHER, f"{name}: {unlike:.1%} of its bytes are others"
