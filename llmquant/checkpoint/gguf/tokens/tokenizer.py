"""A GGUF file's tokenizer as the files of a model folder.

transformers builds it, of the class that ``AutoTokenizer`` would choose (which itself would read
the metadata with the slow reader first), and saves it. It spells tokens that a text holds literally
in GPT-2's alphabet, and knows neither llama.cpp's defaults for a set of splitting rules nor where
sentencepiece puts a space in front (:mod:`.spaces`): these are put right in what it saved. Then the
folder's tokenizer is loaded as everybody loads it, and has to have the file's tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmquant.checkpoint.companions.confusion import CONFUSED, first_line
from llmquant.checkpoint.gguf.header import GgufFile
from llmquant.checkpoint.gguf.tokens.spaces import with_spaces
from llmquant.checkpoint.gguf.tokens.vocabulary import NAMED, Vocabulary, vocabulary_of
from llmquant.checkpoint.weights.json_files import read_json
from llmquant.errors import LayoutError

_TEMPLATE = "tokenizer.chat_template"
# Splitting rules that are GPT-2's own, or that give the same tokens as these do with merges that
# were learned with them; transformers knows the others by name, or uses GPT-2's.
_AS_GPT2 = frozenset({"default", "gpt-2", "smollm", "starcoder", "falcon", "refact", "codeshell"})
# Splitting rules with which llama.cpp puts BOS in front where a file says nothing, and those with
# which a whole word that is a token needs no merges (llama-vocab.cpp).
_LLAMA3 = frozenset(
    {
        *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        *("jina-v5-nano", "tekken"),
    }
)
_ADD_BOS = _LLAMA3 | {"chameleon"}
_IGNORE_MERGES = _LLAMA3 | {"minicpm5", "youtu", "granite-embed-multi-97m"}
_OWN_ENDS = ("gpt2", "llama")  # tokenizer.ggml.model whose defaults for BOS and EOS are known here
_GENERIC = "TokenizersBackend"  # transformers' class that takes tokenizer.json as it is


def save_tokenizer(model: GgufFile, config: Any, folder: Path) -> tuple[str, ...]:
    """Write the tokenizer's files, the chat template among them.

    Args:
        config: the model's, of a class of transformers.

    Returns:
        Notes for people.

    Raises:
        CheckpointError: the file has no tokenizer, or one that makes no sense.
        LayoutError: one that transformers cannot build, or that is another once it is loaded.
    """
    said, vocabulary = model.metadata, vocabulary_of(model)
    tokenizer = _built(model, config)
    named = {
        key.removeprefix(f"{_TEMPLATE}."): text
        for key, text in said.items()
        if key.startswith(f"{_TEMPLATE}.") and isinstance(text, str)
    }
    if named:
        default = {"default": said[_TEMPLATE]} if said.get(_TEMPLATE) else {}
        tokenizer.chat_template = {**default, **named}
    tokenizer.save_pretrained(folder)
    data = _mended(said, vocabulary, read_json(folder / "tokenizer.json"))
    _write(folder / "tokenizer.json", data)
    settings = _named(vocabulary, read_json(folder / "tokenizer_config.json"))
    _write(folder / "tokenizer_config.json", settings)
    loaded = _loaded(model.path, folder, config)
    pieces = said.get("tokenizer.ggml.model") == "llama"
    known = pieces or said.get("tokenizer.ggml.pre") in _known_rules()
    if known and not (_spells_as if pieces else _splits_as)(data, loaded):
        _write(folder / "tokenizer_config.json", {**settings, "tokenizer_class": _GENERIC})
        loaded = _loaded(model.path, folder, config)
    if pieces and not _spells_as(data, loaded):
        raise LayoutError(
            f"{model.path}: its sentencepiece tokenizer is no {type(loaded).__name__}, which is what transformers loads for a "
            f"{config.model_type} model; take the original safetensors model"
        )
    lost = _not_found(vocabulary, loaded)
    _prove(model, vocabulary, loaded, lost)
    return (*_split_otherwise(model, data, loaded), *_cut_up(model, vocabulary, lost))


def _built(model: GgufFile, config: Any) -> Any:
    """The tokenizer as transformers reads it."""
    from transformers import TOKENIZER_MAPPING, PreTrainedTokenizerFast

    kind: Any = TOKENIZER_MAPPING.get(type(config), PreTrainedTokenizerFast)
    if kind is None or kind.__name__ == "MistralCommonBackend":
        kind = PreTrainedTokenizerFast
    first, what = model.files[0], model.metadata.get("tokenizer.ggml.model")
    with _refusing(f"{model.path}: transformers cannot build its tokenizer ({what!r})"):
        return kind.from_pretrained(str(first.parent), gguf_file=first.name)


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Whatever transformers and tokenizers raise, as a LayoutError."""
    try:
        yield
    except Exception as e:  # tokenizers raises nothing more special
        if type(e) is not Exception and not isinstance(e, CONFUSED):
            raise
        raise LayoutError(f"{what}: {first_line(e)}") from e


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _mended(
    said: Mapping[str, Any], vocabulary: Vocabulary, data: dict[str, Any]
) -> dict[str, Any]:
    """tokenizer.json as the file means it.

    Without what transformers' classes add on their own (GPT-2's ``<|endoftext|>``, Gemma's
    ``<mask>``): those ids lie past the file's, where a model has no embedding.
    """
    model, kind = dict(data["model"]), said.get("tokenizer.ggml.model")
    if kind == "gpt2":
        model["vocab"] = known = vocabulary.byte_level()
        # merges into a token that is literal now: its text never gets as far as merges
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        model["merges"] = [m for m in merges if m[0] in known and m[1] in known and m[0] + m[1] in known]  # fmt: skip
        model["ignore_merges"] = said.get("tokenizer.ggml.pre") in _IGNORE_MERGES
    elif kind == "llama":  # without it what no token spells is dropped
        model["unk_token"] = vocabulary.named("unknown")
    texts = model["vocab"] if isinstance(model["vocab"], dict) else set(vocabulary.tokens)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": i, "content": vocabulary.tokens[i], **flags, "special": special}
        for i, special in vocabulary.whole.items()
        if vocabulary.tokens[i] in texts  # Gemma's runs of spaces are found by merges
    ]
    data = {**data, "added_tokens": added, "model": model}
    if kind in _OWN_ENDS:
        data["post_processor"] = _template(_ends(said, vocabulary), vocabulary)
    space = bool(said.get("tokenizer.ggml.add_space_prefix", True))
    return with_spaces(data, in_front=space) if kind == "llama" or not space else data


def _ends(said: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, int]:
    """Which of bos and eos a text gets, and their ids."""
    bos = said.get("tokenizer.ggml.model") == "llama" or said.get("tokenizer.ggml.pre") in _ADD_BOS
    usual = {"bos": bos, "eos": False}
    return {
        name: vocabulary.special[name]
        for name, usually in usual.items()
        if name in vocabulary.special and said.get(f"tokenizer.ggml.add_{name}_token", usually)
    }


def _template(ends: Mapping[str, int], vocabulary: Vocabulary) -> dict[str, Any]:
    """bos and eos around a text and around a pair, in the words of tokenizer.json."""
    texts = {name: vocabulary.tokens[i] for name, i in ends.items()}

    def around(part: str, number: int) -> list[dict[str, Any]]:
        here = {n: {"SpecialToken": {"id": text, "type_id": number}} for n, text in texts.items()}
        found = [here.get("bos"), {"Sequence": {"id": part, "type_id": number}}, here.get("eos")]
        return [piece for piece in found if piece]

    single = around("A", 0)
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, *around("B", 1)],
        "special_tokens": {
            text: {"id": text, "ids": [ends[name]], "tokens": [text]}
            for name, text in texts.items()
        },
    }


def _named(vocabulary: Vocabulary, settings: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json with the file's special tokens, and none that it has not."""
    texts = set(vocabulary.tokens)
    own = {
        key: text if text in texts else None
        for key, text in settings.items()
        if key.endswith("_token") and isinstance(text, str)
    }
    named = {f"{name}_token": vocabulary.named(key) for key, name in NAMED.items()}
    return {**settings, **own, **named}


def _loaded(path: Path, folder: Path, config: Any) -> Any:
    """The folder's tokenizer, loaded as everybody loads it."""
    from transformers import AutoTokenizer

    with _refusing(f"{path}: transformers cannot load the tokenizer that it made of it"):
        return AutoTokenizer.from_pretrained(folder, config=config)


def _splits_as(data: Mapping[str, Any], loaded: Any) -> bool:
    """Whether a loaded tokenizer has the rules of tokenizer.json; some classes have their own."""
    own, ignoring = loaded.backend_tokenizer, data["model"].get("ignore_merges", False)
    splits = json.loads(own.pre_tokenizer.__getstate__()) if own.pre_tokenizer else None
    return (splits, getattr(own.model, "ignore_merges", False)) == (data["pre_tokenizer"], ignoring)


def _spells_as(data: Mapping[str, Any], loaded: Any) -> bool:
    """Whether a loaded tokenizer spells a text in pieces, and pieces as a text, as tokenizer.json
    does: some classes spell in bytes, whatever the folder says."""
    own = loaded.backend_tokenizer
    found = {key: getattr(own, key) for key in ("normalizer", "pre_tokenizer", "decoder")}
    same = all(data[k] == (json.loads(v.__getstate__()) if v else None) for k, v in found.items())
    return same and own.model.byte_fallback == data["model"]["byte_fallback"]


def _prove(
    model: GgufFile, vocabulary: Vocabulary, loaded: Any, lost: Mapping[int, list[int]]
) -> None:
    """Hold the loaded tokenizer against the file.

    Raises:
        LayoutError: naming what it has otherwise.
    """
    if found := next(_differences(model, vocabulary, loaded, lost), None):
        raise LayoutError(
            f"{model.path}: {found} in the tokenizer that transformers loads; take the original safetensors model"
        )


def _not_found(vocabulary: Vocabulary, loaded: Any) -> dict[int, list[int]]:
    """Tokens that should be found by their text → what that text is instead."""
    texts = [vocabulary.tokens[i] for i in vocabulary.whole]
    pieces = loaded(texts, add_special_tokens=False)["input_ids"] if texts else []
    return {i: ids for i, ids in zip(vocabulary.whole, pieces, strict=True) if ids != [i]}


def _differences(
    model: GgufFile, vocabulary: Vocabulary, loaded: Any, lost: Mapping[int, list[int]]
) -> Iterator[str]:
    exact = model.metadata.get("tokenizer.ggml.model") == "gpt2"
    for i, ids in lost.items():
        if exact or vocabulary.whole[i]:
            yield f"its token {i}, {vocabulary.tokens[i]!r:.60}, is {ids!s:.60}"
    for key, name in NAMED.items():
        own, other = vocabulary.special.get(key), getattr(loaded, f"{name}_token_id")
        if own not in (None, other):
            yield f"tokenizer.ggml.{key}_token_id is {own} and becomes {other}"
    if model.metadata.get("tokenizer.ggml.model") in _OWN_ENDS:
        ends = _ends(model.metadata, vocabulary)
        front, back = ([ends[name]] if name in ends else [] for name in ("bos", "eos"))
        plain = loaded("a", add_special_tokens=False).input_ids
        if loaded("a").input_ids != [*front, *plain, *back]:
            yield f"a text gets other tokens around it than {ends or 'none'}"
    rows = model.tensors["token_embd.weight"].shape[0]
    last = max(loaded.get_vocab().values())
    if last >= rows:
        yield f"there is a token {last}, past its {rows} embeddings,"


def _cut_up(
    model: GgufFile, vocabulary: Vocabulary, lost: Mapping[int, list[int]]
) -> tuple[str, ...]:
    """A note on pieces of sentencepiece that stand for themselves there, and are no special
    tokens: runs of blanks, for instance."""
    if not lost:
        return ()
    some = ", ".join(f"{vocabulary.tokens[i]!r:.30} ({i})" for i in list(lost)[:3])
    return (
        f"{model.path.name}: {len(lost)} user-defined tokens are not found by their text in the tokenizer that transformers "
        f"makes, such as {some}; texts with them get other tokens than in training",
    )


def _split_otherwise(model: GgufFile, data: Mapping[str, Any], loaded: Any) -> tuple[str, ...]:
    """A note on a byte-level vocabulary whose texts are split by other rules than the file's."""
    said, kept = model.metadata, _splits_as(data, loaded)
    rules = said.get("tokenizer.ggml.pre")
    known = rules in _known_rules()
    if said.get("tokenizer.ggml.model") != "gpt2" or (known and kept):
        return ()
    what = "which transformers does not use for such a model" if known else "which transformers does not know"  # fmt: skip
    used = "GPT-2" if kept else type(loaded).__name__
    return (
        f"{model.path.name}: text is split by rules {rules!r}, {what}; {used}'s are used, "
        "so some texts may get other tokens than in training",
    )


def _known_rules() -> frozenset[str]:
    """Splitting rules that stand in the tokenizer.json that transformers makes."""
    try:
        from transformers.integrations.gguf import gguf_tokenizer_mapping
    except ImportError:  # before 5.23: no rules but GPT-2's and the class's own
        return _AS_GPT2 | {"qwen2", "llama-bpe"}
    return _AS_GPT2 | set(gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS)
