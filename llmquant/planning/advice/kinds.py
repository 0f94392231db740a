"""Models that are not this tool's, and what fits them instead.

A decoder that writes token by token reads all its weights for every token, so weights of few bits
make it faster. Other models compute on many positions at once: for them arithmetic counts, and
that wants integer activations too. What a folder holds is read from its config, by transformers'
own tables of classes; nothing is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmquant.checkpoint.reader import read_json


@dataclass(frozen=True, slots=True)
class OtherKind:
    """A model that llmquant does not quantize.

    Attributes:
        name: what it is.
        why: why 4-bit weights are not the first thing to try.
        instead: what is, first things first.
    """

    name: str
    why: str
    instead: tuple[str, ...]


_ENCODER = OtherKind(
    "an encoder (or a classifier)",
    "it reads all tokens at once, so its time goes into arithmetic; 4-bit weights save reading weights, which is little of it",
    (
        "dynamic INT8 first: weights and activations of 8 bits, no calibration (ONNX Runtime's quantize_dynamic, torchao)",
        "if the accuracy drops too far: static INT8 with calibration data, sensitive layers left in 16 bits",
        "then quantization-aware training; pruning whole heads or layers saves more than fewer bits do",
    ),
)
_SEQ2SEQ = OtherKind(
    "an encoder-decoder",
    "llmquant quantizes and evaluates decoders alone; here half of the work is an encoder over all tokens at once",
    (
        "dynamic INT8 first (CTranslate2, or ONNX Runtime's quantize_dynamic)",
        "measure on the task itself (WER, BLEU, ROUGE), since perplexity says little here",
        "if it drops too far: keep the encoder in 16 bits, then quantization-aware training",
    ),
)
_VISION = OtherKind(
    "a vision model",
    "convolutions and image patches are arithmetic on many positions; it gains from INT8 activations, not from 4-bit weights",
    (
        "a transformer on images: dynamic INT8 first (ONNX Runtime, torchao)",
        "a CNN: static INT8, per channel, batch norms folded, calibrated on some hundred images (ONNX Runtime, PyTorch's PT2E)",
        "if it drops too far: quantization-aware training for a few epochs; structured pruning for more speed",
    ),
)
_DIFFUSION = OtherKind(
    "a diffusion model",
    "its errors add up over the denoising steps and show in images; neither perplexity nor KL measures that",
    (
        "diffusers' own quantization of the transformer's or UNet's linears to INT8 or FP8 (torchao, bitsandbytes, GGUF)",
        "leave the VAE, embeddings and the first and last layers in 16 bits",
        "compare images of the same seeds (FID, LPIPS, and people)",
    ),
)
_AUDIO = OtherKind(
    "a speech or audio model",
    "it computes on many frames at once; 4-bit weights save reading weights, which is little of its time",
    (
        "dynamic INT8 first (CTranslate2, ONNX Runtime's quantize_dynamic)",
        "measure the word error rate on your own recordings",
        "then static INT8 with calibration, then quantization-aware training",
    ),
)
_EXPORTED = OtherKind(
    "a model exported for another runtime",
    "its graph is fixed; llmquant starts from the checkpoint that it was exported from",
    (
        "the runtime's own quantizer: dynamic INT8 first, then static INT8 with calibration",
        "or quantize the checkpoint and export that",
    ),
)

# transformers' tables of classes → what a class in them is; None: a decoder.
_TABLES = {
    "MODEL_FOR_CAUSAL_LM": None,
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT": None,
    "MODEL_FOR_SPEECH_SEQ_2_SEQ": _AUDIO,
    "MODEL_FOR_CTC": _AUDIO,
    "MODEL_FOR_AUDIO_CLASSIFICATION": _AUDIO,
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM": _SEQ2SEQ,
    "MODEL_FOR_MASKED_LM": _ENCODER,
    "MODEL_FOR_SEQUENCE_CLASSIFICATION": _ENCODER,
    "MODEL_FOR_TOKEN_CLASSIFICATION": _ENCODER,
    "MODEL_FOR_QUESTION_ANSWERING": _ENCODER,
    "MODEL_FOR_IMAGE_CLASSIFICATION": _VISION,
    "MODEL_FOR_OBJECT_DETECTION": _VISION,
    "MODEL_FOR_SEMANTIC_SEGMENTATION": _VISION,
    "MODEL_FOR_IMAGE": _VISION,
    "MODEL_FOR_DEPTH_ESTIMATION": _VISION,
}
# By model type alone, where a config names no class of those: BERT, BART and Whisper could be made
# decoders and are in the first table for that, so what they are asked for most comes first.
_BY_TYPE = ("MODEL_FOR_MASKED_LM", "MODEL_FOR_SPEECH_SEQ_2_SEQ", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM")
_EXPORTS = {".onnx", ".tflite", ".engine", ".mlpackage", ".pte", ".xml"}


def other_kind(path: Path) -> OtherKind | None:
    """What a file or folder is if it is certainly no decoder; None where it is one or nobody knows.

    Raises:
        CheckpointError: a config.json that is no JSON.
    """
    if path.suffix.lower() in _EXPORTS:
        return _EXPORTED
    if (path / "model_index.json").is_file():
        return _DIFFUSION
    if not (path / "config.json").is_file():
        exported = path.is_dir() and any(f.suffix.lower() in _EXPORTS for f in path.iterdir())
        return _EXPORTED if exported else None
    config = read_json(path / "config.json")
    if "_diffusers_version" in config:
        return _DIFFUSION
    if isinstance(config.get("architecture"), str) and "num_classes" in config:  # timm
        return _VISION
    return _by_tables(config)


def _by_tables(config: dict[str, Any]) -> OtherKind | None:
    """By the class that the config names, else by its model type."""
    named = config.get("architectures")
    classes = {n for n in named if isinstance(n, str)} if isinstance(named, list) else set()
    for table, kind in _TABLES.items():
        if classes & {c for of_type in _table(table).values() for c in of_type}:
            return kind
    model_type = config.get("model_type")
    for table in () if config.get("is_decoder") else (*_BY_TYPE, *_TABLES):
        if model_type in _table(table):
            return _TABLES[table]
    return None


def _table(name: str) -> dict[str, tuple[str, ...]]:
    """Model type → classes."""
    from transformers.models.auto import modeling_auto

    found = dict(getattr(modeling_auto, f"{name}_MAPPING_NAMES"))
    return {t: (c,) if isinstance(c, str) else tuple(c) for t, c in found.items()}
