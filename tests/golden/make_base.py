"""Write `base/`: a two-layer random Llama in fp16, small enough to live in git.

The weights are drawn from a fixed seed, normal with std 0.05, and one weight in two hundred is six
times larger, so that scales and clipping have something to do. Two rows of the first k_proj are all
positive and two all negative: an asymmetric quantizer puts their zero points at the two ends of the
code range, where formats go wrong. A head has 32 dimensions because vLLM's CPU attention refuses
16.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

OUT = Path(__file__).resolve().parent / "base"
CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    vocab_size=64,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    attention_bias=False,
    bos_token_id=1,
    eos_token_id=2,
)


def make_model() -> LlamaForCausalLM:
    generator = torch.Generator().manual_seed(20240)
    model = LlamaForCausalLM(CONFIG)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(1 + 0.1 * noise)
                continue
            outlier = torch.rand(weight.shape, generator=generator) < 0.005
            weight.copy_(0.05 * torch.where(outlier, 6 * noise, noise))
            if name == "model.layers.0.self_attn.k_proj.weight":
                weight[0:2] = weight[0:2].abs()
                weight[2:4] = -weight[2:4].abs()
    return model.half()


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>"] + [f"w{i}" for i in range(3, CONFIG.vocab_size)]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    )


def first_layers(layers: int, folder: Path) -> Path:
    """A copy of `base/` in `folder` with fewer layers: most fixtures need only one, and git keeps
    them all."""
    shutil.copytree(OUT, folder)
    config = json.loads((OUT / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"num_hidden_layers": layers}, indent=2)
    )
    dropped = tuple(f"model.layers.{i}." for i in range(layers, config["num_hidden_layers"]))
    kept = {
        name: t
        for name, t in load_file(OUT / "model.safetensors").items()
        if not name.startswith(dropped)
    }
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


if __name__ == "__main__":
    make_model().save_pretrained(OUT)
    make_tokenizer().save_pretrained(OUT)
