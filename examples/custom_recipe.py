"""Write a recipe of your own: 3 bits, 4 for some linears, the first block left alone.

    python examples/custom_recipe.py [FOLDER]

FOLDER (out/custom-recipe unless given) gets the recipe and the model. The recipe is a file like
those in recipes/: `llmquant quantize MODEL -o OUT --recipe FILE` takes it too.
Took 25 seconds on two cores.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import llmquant

MODEL = Path(__file__).resolve().parent / "tiny-llama"

# Keys that are left out keep their defaults; `llmquant recipes gptq-w4g128` prints them all.
# The first override that matches counts. Engines fuse q, k and v, so these share a scheme.
RECIPE = f"""\
description: 3 bits, 4 for v and its fused neighbours and for down_proj
method: gptq
weights: {{bits: 3, group_size: 64, symmetric: true}}
overrides:
  - {{match: "*.self_attn.[qkv]_proj", bits: 4}}
  - {{match: down_proj, bits: 4, group_size: 128}}
ignore: [lm_head, "model.layers.0.*"]
calibration:
  source: "file:{MODEL / "calibration.txt"}"
  nsamples: 16
  seqlen: 256
"""


def main() -> None:
    """Write the recipe, run it, show which linear got what."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out/custom-recipe")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "mixed-3-4.yaml"
    path.write_text(RECIPE, encoding="utf-8")

    # Typos are errors: an unknown key or an impossible value names its place.
    recipe = llmquant.load_recipe(path)
    options = llmquant.QuantizeOptions(overwrite=True)
    result = llmquant.quantize(MODEL, folder / "model", recipe, options)

    found = llmquant.inspect(result.path)
    schemes = Counter((m.name.rpartition(".")[2], m.scheme) for m in found.modules)
    for (linear, scheme), count in sorted(schemes.items()):
        print(f"{linear:10} {scheme:12} {count}")
    print(f"left alone: {len(result.skipped)} linears")
    print(f"{result.bits_per_weight:.3f} bits per quantized weight")

    # The folder keeps the recipe that made it; `llmquant verify --rerun` repeats the run.
    again = llmquant.load_recipe(result.path / "recipe.yaml")
    print(f"recipe kept in the folder: {again == recipe}")


if __name__ == "__main__":
    main()
