"""Small models that also see, of sizes that vLLM's kernels take."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

TEXT: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "pad_token_id": 4095,
}
ROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [4, 6, 6],
    }
}
SIGLIP: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "out_hidden_size": 128,
}
WHOLES: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": TEXT | {"sliding_window": 64, "query_pre_attn_scalar": 32},
        "vision_config": SIGLIP,
        "mm_tokens_per_image": 4,
    },
    "qwen2_5_vl": {
        "text_config": TEXT | ROPE,
        "vision_config": QWEN | {"fullatt_block_indexes": [0]},
    },
    "qwen3_vl": {
        "text_config": TEXT | ROPE,
        "vision_config": QWEN | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    },
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral"},
        "vision_config": SIGLIP | {"model_type": "pixtral", "head_dim": 32},
        "tie_word_embeddings": False,
    },
    "llama4": {
        "text_config": TEXT
        | {"intermediate_size_mlp": 256, "num_local_experts": 4, "interleave_moe_layer_step": 2},
        "vision_config": SIGLIP
        | {"projector_input_dim": 64, "projector_output_dim": 64, "vision_output_dim": 64},
    },
    "mllama": {
        "text_config": TEXT
        | {
            "num_hidden_layers": 3,
            "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "vision_config": SIGLIP
        | {
            "num_global_layers": 1,
            "attention_heads": 2,
            "vision_output_dim": 128,
            "intermediate_layers_indices": [0],
        },
        "image_token_index": 5,
    },
}
# Of the processor for images; vLLM asks for this one's also where no image comes.
PROCESSORS: dict[str, dict[str, Any]] = {
    "mllama": {
        "image_processor_type": "MllamaImageProcessor",
        "processor_class": "MllamaProcessor",
        "size": {"height": 28, "width": 28},
        "max_image_tiles": 4,
    }
}


def random_whole(kind: str) -> PreTrainedModel:
    """A random model of the type, its vectors and experts too."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **WHOLES[kind], bos_token_id=1, eos_token_id=2)
    config.dtype = torch.float16
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or parameter.ndim == 1:
                parameter.add_(0.03 * torch.randn(parameter.shape))
    for parameter in model.parameters():  # not its buffers: rotations are complex numbers
        parameter.data = parameter.data.to(torch.float16)
    return model
