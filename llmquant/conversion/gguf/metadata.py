"""What a GGUF file says beside its tensors: the model's shape, its rotary frequencies, and the
tokenizer as llama.cpp knows it.

llama.cpp does not run a tokenizer.json; it has the splitting rules built in, by name
(``tokenizer.ggml.pre``). A tokenizer is exported only if its rules *are* one of those: the regular
expression is compared as text, and "llama-bpe" differs from "smaug-bpe" only in taking whole words
from the vocabulary before merging. Anything else would tokenize differently, silently.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.checkpoint.reader import CheckpointReader, read_json
from llmquant.conversion.gguf.special import read_if_there, special_ids
from llmquant.errors import FormatError, LayoutError

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# (expression, ignore_merges) → llama.cpp's name; None is ByteLevel's own expression.
_PRE = {
    (_LLAMA3, True): "llama-bpe",
    (_LLAMA3, False): "smaug-bpe",
    (_QWEN2, False): "qwen2",
    (None, False): "gpt-2",
}


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A byte-level BPE, ids in order."""

    tokens: tuple[str, ...]
    special: frozenset[int]
    added: frozenset[int]
    merges: tuple[str, ...]
    pre: str
    ids: Mapping[str, int]
    add_bos: bool
    chat_template: str | None


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A Llama's numbers, as config.json has them."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    vocab: int
    epsilon: float
    rope_theta: float
    rope_factors: Tensor | None
    tied: bool
    tokenizer: Tokenizer


def describe(reader: CheckpointReader) -> GgufModel:
    """Read what the file has to say.

    Raises:
        FormatError: an architecture, rotary scaling or tokenizer that llama.cpp's llama models do
            not have.
        CheckpointError: no tokenizer.json.
    """
    config, where = reader.config, reader.path / "config.json"
    kind = config.get("model_type")
    if kind not in ("llama", "mistral") or config.get("sliding_window"):
        raise LayoutError(
            f"{where}: {kind} models cannot be written as GGUF here; llama and mistral (no sliding window) can"
        )
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        rope = config.get("rope_parameters") or {
            **(config.get("rope_scaling") or {}),
            "rope_theta": config.get("rope_theta"),
        }
        head_dim, theta = (
            int(config.get("head_dim") or hidden // heads),
            float(rope.get("rope_theta") or 10000.0),
        )
        return GgufModel(
            name=reader.path.resolve().name,
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            intermediate=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=head_dim,
            context=int(config["max_position_embeddings"]),
            vocab=int(config["vocab_size"]),
            epsilon=float(config["rms_norm_eps"]),
            rope_theta=theta,
            rope_factors=rope_factors(rope, theta, head_dim),
            tied=bool(config.get("tie_word_embeddings", False)),
            tokenizer=read_tokenizer(reader.path),
        )
    except (KeyError, TypeError, ValueError) as e:
        raise FormatError(f"{where} lacks what a GGUF file must say: {e!r}") from e


def rope_factors(rope: Mapping[str, Any], theta: float, head_dim: int) -> Tensor | None:
    """What llama.cpp divides the rotary frequencies by, float32 ``[head_dim / 2]``, or None for
    plain ones.

    Source: Llama 3.1's frequency scaling, as in transformers' ``_compute_llama3_parameters``.
    """
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise LayoutError(
            f"rotary scaling {kind!r} is not written as GGUF here; default and llama3 are"
        )
    factor, low, high = (float(rope[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(rope["original_max_position_embeddings"])
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    wavelength = 2 * math.pi / frequency
    smooth = (context / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return torch.where(
        wavelength > context / low, factor, torch.where(wavelength < context / high, 1.0, between)
    )


def read_tokenizer(folder: Path) -> Tokenizer:
    """A folder's tokenizer.json, if llama.cpp can tokenize the same way.

    Raises:
        FormatError: it cannot.
    """
    path = folder / "tokenizer.json"
    data = read_json(path)
    model = data.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback") or data.get("normalizer"):
        raise LayoutError(
            f"{path}: only byte-level BPE tokenizers without a normalizer are written as GGUF here"
        )
    key = (_expression(data.get("pre_tokenizer") or {}), bool(model.get("ignore_merges")))
    if key not in _PRE:
        raise LayoutError(
            f"{path} splits text by rules that llama.cpp does not have under any name known here"
        )
    settings = read_if_there(folder / "tokenizer_config.json")
    added = {int(t["id"]): t for t in data.get("added_tokens") or ()}
    by_id = {int(i): t for t, i in model["vocab"].items()} | {
        i: str(t["content"]) for i, t in added.items()
    }
    tokens = tuple(by_id.get(i, f"[PAD{i}]") for i in range(max(by_id) + 1))
    template = folder / "chat_template.jinja"
    return Tokenizer(
        tokens=tokens,
        special=frozenset(i for i, t in added.items() if t.get("special")),
        added=frozenset(added),
        merges=tuple(m if isinstance(m, str) else " ".join(m) for m in model["merges"]),
        pre=_PRE[key],
        ids=special_ids(folder, settings, tokens, added),
        add_bos="SpecialToken"
        in json.dumps((_template(data.get("post_processor") or {}).get("single") or [{}])[0]),
        chat_template=template.read_text("utf-8")
        if template.is_file()
        else settings.get("chat_template"),
    )


def _expression(pre: Mapping[str, Any]) -> str | None:
    """The one regular expression a byte-level pre-tokenizer splits by; ``""`` for anything that is
    not that."""
    parts = pre.get("pretokenizers") if pre.get("type") == "Sequence" else [pre]
    match list(parts or ()):
        case [{"type": "ByteLevel", "add_prefix_space": False, **rest}] if rest.get(
            "use_regex", True
        ):
            return None
        case [
            {
                "type": "Split",
                "pattern": {"Regex": str(regex)},
                "behavior": "Isolated",
                "invert": False,
            },
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return regex
    return ""


def _template(post: Mapping[str, Any]) -> Mapping[str, Any]:
    """The template among possibly several post-processors."""
    parts = post.get("processors") if post.get("type") == "Sequence" else [post]
    return next((p for p in parts or () if p.get("type") == "TemplateProcessing"), {})


def write_metadata(gguf: Any, writer: Any, model: GgufModel, kinds: Collection[str]) -> None:
    """Fill a ``gguf.GGUFWriter``'s key-value part."""
    commonest = max(("Q4_0", "Q4_1", "Q8_0", "F16", "BF16"), key=list(kinds).count)
    file_type = gguf.LlamaFileType[f"MOSTLY_{commonest}"]
    writer.add_name(model.name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(model.layers)
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.hidden)
    writer.add_feed_forward_length(model.intermediate)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(model.epsilon)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_vocab_size(model.vocab)
    _write_tokenizer(gguf, writer, model)


def _write_tokenizer(gguf: Any, writer: Any, model: GgufModel) -> None:
    tokenizer, kinds = model.tokenizer, gguf.TokenType
    if len(tokenizer.tokens) > model.vocab:
        raise FormatError(
            f"the tokenizer has {len(tokenizer.tokens)} tokens, the model embeds {model.vocab}"
        )
    unused = [f"[PAD{i}]" for i in range(len(tokenizer.tokens), model.vocab)]
    types = [
        kinds.CONTROL
        if i in tokenizer.special
        else kinds.USER_DEFINED
        if i in tokenizer.added
        else kinds.NORMAL
        for i in range(len(tokenizer.tokens))
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list([*tokenizer.tokens, *unused])
    writer.add_token_types([*types, *[kinds.UNUSED] * len(unused)])
    writer.add_token_merges(tokenizer.merges)
    for key, write in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("pad", writer.add_pad_token_id),
        ("unk", writer.add_unk_token_id),
        ("eot", writer.add_eot_token_id),
        ("eom", writer.add_eom_token_id),
    ):
        if key in tokenizer.ids:
            write(tokenizer.ids[key])
    writer.add_add_bos_token(tokenizer.add_bos)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
