"""The model builder of onnxruntime-genai, run as a program of its own environment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llmquant.checkpoint.weights.exported import DATA, GENAI_CONFIG, MODEL
from llmquant.conversion.onnx.environment import OnnxEnvironment
from llmquant.conversion.onnx.options import FP16, KEPT, PACKED
from llmquant.errors import LlmquantError

_HEAD, _EMBEDDING = "/lm_head/MatMul", "/model/embed_tokens/Gather"


def builder_options(
    kind: str, head: str, accuracy_level: int, tied: bool, fuse: bool
) -> Mapping[str, str]:
    """The builder's ``--extra_options``.

    Args:
        tied: the head shares the embeddings.
        fuse: q, k and v of every layer have one scheme.
    """
    options = {"hf_token": "false"}
    if not fuse:
        options["fuse_qkv"] = "false"
    kept = head == KEPT
    if tied and kept:
        options["shared_embeddings"] = "true"
    if kind == PACKED:
        options["accuracy_level"] = str(accuracy_level)
        excluded = [_HEAD, _EMBEDDING] if kept else [_EMBEDDING]
        options["nodes_to_exclude"] = ",".join(excluded)
        if head == "int8":
            options["matmul_mixed_precision"] = "last_matmul:int8"
    return options


def build(
    environment: OnnxEnvironment,
    source: Path,
    target: Path,
    kind: str,
    provider: str,
    options: Mapping[str, str],
) -> None:
    """Write ``target`` (model.onnx, its data, genai_config.json, tokenizer) from the folder
    ``source``.

    Raises:
        LlmquantError: the builder failed; carries the end of what it printed.
        DiskError: for want of space.
    """
    precision = "int4" if kind == PACKED else "fp16" if kind == FP16 else "fp32"
    module = [str(environment.python), "-I", "-m", "onnxruntime_genai.models.builder"]
    places = ["-i", str(source), "-c", str(target.with_name("cache")), "-o", str(target)]
    extra = [f"{name}={value}" for name, value in options.items()]
    command = [*module, "-p", precision, "-e", provider, *places, "--extra_options", *extra]
    environment.run("the model builder of onnxruntime-genai", command, target)
    absent = [n for n in (MODEL, DATA, GENAI_CONFIG) if not (target / n).is_file()]
    if absent:
        raise LlmquantError(
            f"the model builder of onnxruntime-genai ended without {', '.join(absent)}"
        )
