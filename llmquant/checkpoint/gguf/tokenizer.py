"""A GGUF file's tokenizer as the files of a model folder.

transformers builds it, of the class that ``AutoTokenizer`` would choose (which itself would read
the metadata with the slow reader first), and saves it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmquant.checkpoint.companions.confusion import CONFUSED, first_line
from llmquant.checkpoint.gguf.header import GgufFile
from llmquant.checkpoint.weights.json_files import read_json
from llmquant.errors import CheckpointError, LayoutError

_TEMPLATE = "tokenizer.chat_template"
# Splitting rules that are GPT-2's own, or that give the same tokens as these do with merges that
# were learned with them; transformers knows the others by name, or uses GPT-2's.
_AS_GPT2 = frozenset({"default", "gpt-2", "smollm", "starcoder", "falcon", "refact", "codeshell"})


def save_tokenizer(model: GgufFile, config: Any, folder: Path) -> tuple[str, ...]:
    """Write the tokenizer's files, the chat template among them.

    Args:
        config: the model's, of a class of transformers.

    Returns:
        Notes for people.

    Raises:
        CheckpointError: the file has no tokenizer.
        LayoutError: one that transformers cannot build.
    """
    from transformers import TOKENIZER_MAPPING, PreTrainedTokenizerFast

    said, first = model.metadata, model.files[0]
    if not said.get("tokenizer.ggml.tokens"):
        raise CheckpointError(
            f"{model.path} has no tokenizer (tokenizer.ggml.tokens); fetch a conversion with one"
        )
    kind: Any = TOKENIZER_MAPPING.get(type(config), PreTrainedTokenizerFast)
    if kind is None or kind.__name__ == "MistralCommonBackend":
        kind = PreTrainedTokenizerFast
    try:
        tokenizer = kind.from_pretrained(str(first.parent), gguf_file=first.name)
    except CONFUSED as e:
        what = said.get("tokenizer.ggml.model")
        raise LayoutError(
            f"{model.path}: transformers cannot build its tokenizer ({what!r}): {first_line(e)}"
        ) from e
    named = {
        key.removeprefix(f"{_TEMPLATE}."): text
        for key, text in said.items()
        if key.startswith(f"{_TEMPLATE}.") and isinstance(text, str)
    }
    if named:
        default = {"default": said[_TEMPLATE]} if said.get(_TEMPLATE) else {}
        tokenizer.chat_template = {**default, **named}
    tokenizer.save_pretrained(folder)
    _only_the_files(folder / "tokenizer.json", len(said["tokenizer.ggml.tokens"]))
    return _doubts(model)


def _only_the_files(path: Path, count: int) -> None:
    """Take out tokens that transformers' classes add on their own (GPT-2's ``<|endoftext|>``):
    their ids lie past the file's, where a model has no embedding."""
    data = read_json(path)
    added = [t for t in data["added_tokens"] if t["id"] < count]
    if len(added) < len(data["added_tokens"]):
        text = json.dumps({**data, "added_tokens": added}, indent=2, ensure_ascii=False)
        path.write_text(text, encoding="utf-8")


def _doubts(model: GgufFile) -> tuple[str, ...]:
    said = model.metadata
    rules = said.get("tokenizer.ggml.pre")
    if said.get("tokenizer.ggml.model") != "gpt2" or rules in _AS_GPT2 or rules in _known_rules():
        return ()
    return (
        f"{model.path.name}: text is split by rules {rules!r}, which transformers does not know; GPT-2's are used, "
        "so some texts may get other tokens than in training",
    )


def _known_rules() -> frozenset[str]:
    try:
        from transformers.integrations.gguf import gguf_tokenizer_mapping
    except ImportError:  # before 5.23: no rules but GPT-2's and the class's own
        return frozenset({"qwen2", "llama-bpe"})
    return frozenset(gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS)
