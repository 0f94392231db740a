"""A model folder of the size of a 70B that takes no disk: headers, and holes for the numbers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from llmquant.checkpoint.shards import Stored, header, order


def seventy_billion(folder: Path) -> Path:
    """A 70B Llama's folder whose shards are all header and hole."""
    folder.mkdir()
    hidden, inner, layers, vocabulary, kv = 8192, 28672, 80, 128256, 1024
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    linears = {
        "self_attn.q_proj": [hidden, hidden],
        "self_attn.k_proj": [kv, hidden],
        "self_attn.v_proj": [kv, hidden],
        "self_attn.o_proj": [hidden, hidden],
        "mlp.gate_proj": [inner, hidden],
        "mlp.up_proj": [inner, hidden],
        "mlp.down_proj": [hidden, inner],
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
    }
    shards = [
        {f"model.layers.{i}.{n}.weight": s for n, s in linears.items()} for i in range(layers)
    ]
    shards.append(
        {"model.embed_tokens.weight": [vocabulary, hidden], "model.norm.weight": [hidden]}
    )
    shards.append({"lm_head.weight": [vocabulary, hidden]})
    weight_map = {}
    for i, tensors in enumerate(shards):
        stored = {n: Stored(torch.bfloat16, tuple(s)) for n, s in tensors.items()}
        name = f"model-{i:05d}.safetensors"
        head = header(stored)
        with (folder / name).open("wb") as f:
            f.write(head)
            os.truncate(f.fileno(), len(head) + sum(stored[n].nbytes for n in order(stored)))
        weight_map.update(dict.fromkeys(tensors, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
