"""A small config of every model that also sees or hears, as far as one can be made from the config
that transformers makes: the same for each of its parts as :mod:`small_kinds` does for a text model.
"""

from __future__ import annotations

from typing import Any

from small_kinds import CHANGES, SMALL, SPREAD
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

WHOLES = tuple(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
_EYE: dict[str, int] = {
    **dict.fromkeys(("depth", "layers"), 2),
    **dict.fromkeys(("num_heads", "num_attention_heads"), 4),
    **dict.fromkeys(("embed_dim", "width"), 64),
    "encoder_ffn_dim": 96,
    "image_size": 28,
    "patch_size": 14,
    "num_channels": 3,
}
# Widths that one part has of another.
_SHARED = (
    *("out_hidden_size", "text_hidden_size", "audio_hidden_size", "llm_hidden_size", "output_dim"),
    *("projection_dim", "proj_hidden_size", "out_dim"),
)
_CHOSEN = ("fullatt_block_indexes", "deepstack_visual_indexes", "vision_feature_layer")
_LAYERS = ("num_hidden_layers", "n_layers", "num_layers", "depth")
_POSITIONS: dict[str, list[int]] = {
    **{
        kind: [2, 3, 3]
        for kind in (
            *("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "paddleocr_vl_text"),
            *("glm4v_text", "glm_ocr_text", "cosmos3_edge_text", "ernie4_5_vl_moe_text"),
        )
    },
    "glm4v_moe_text": [1, 1, 2],
}
_OWN: dict[str, dict[str, Any]] = {
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "glm5_next_text": {"num_key_value_heads": 4, "qk_rope_head_dim": 0},
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "mistral_large4_text": {"num_key_value_heads": 4},
    "hunyuan_vl_text": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "xdrope_section": [2, 2, 2, 2],
        },
    },
    "step3p5": {"sliding_window": 8},
    "minimax_m3_vl_text": {"shared_intermediate_size": 32},
}


def small_whole(kind: str, **changes: Any) -> PreTrainedConfig:
    """A small config of the kind, whose head is its own."""
    return _small(CONFIG_MAPPING[kind](), **{"tie_word_embeddings": False, **changes})


def _small(config: PreTrainedConfig, **changes: Any) -> PreTrainedConfig:
    left = {"model_type", "transformers_version", "architectures", "_name_or_path", "dtype"}
    known = {k: v for k, v in config.to_dict().items() if k not in left}
    inside = {k: getattr(config, k, None) for k in type(config).sub_configs}
    parts = {k: v for k, v in inside.items() if isinstance(v, PreTrainedConfig)}
    values = dict(SMALL) if "vocab_size" in known else SMALL | _EYE
    values |= dict.fromkeys(_SHARED, 64) | dict.fromkeys(SPREAD, 0.06)
    numbers = (int, float)
    wanted = {
        k: values[k]
        for k, v in known.items()
        if k in values and (isinstance(v, numbers) or k.endswith("token_id"))
    }
    layers = next((known[k] for k in _LAYERS if isinstance(known.get(k), int)), 0)
    lists = {
        k: _of_two_layers(v) if len(v) == layers else [0, 1][: len(v)]
        for k, v in known.items()
        if isinstance(v, (list, tuple)) and (len(v) == layers or k in _CHOSEN)
    }
    kind = config.model_type
    if kind in _POSITIONS:
        rope = known.get("rope_parameters") or {"rope_type": "default", "rope_theta": 10000.0}
        lists["rope_parameters"] = {**rope, "mrope_section": _POSITIONS[kind]}
    small = {name: _small(part).to_dict() for name, part in parts.items()}
    given = {**known, **lists, **wanted, **CHANGES.get(kind, {}), **_OWN.get(kind, {}), **small}
    # Says for single layers what the rest says for all.
    given.pop("per_layer_config", None)
    return type(config)(**{**given, **changes})


def _of_two_layers(values: list[Any] | tuple[Any, ...]) -> list[Any]:
    """What is said of each layer, for two: of as many kinds as there are."""
    return [values[0], next((v for v in values if v != values[0]), values[-1])]
