"""The tokenizer of an imported GGUF file, as AutoTokenizer loads it from the folder: every token
that the file has whole, its special ids, llama.cpp's defaults, and what makes no sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf_kit
import pytest
import sentencepiece
from tiny_models import random_model
from transformers import AutoTokenizer

from llmquant.checkpoint.gguf.folder import ImportResult, write_folder
from llmquant.errors import CheckpointError, LayoutError, LlmquantError

_OWN = {"vocab_size": gguf_kit.VOCAB, "bos_token_id": None, "eos_token_id": gguf_kit.EOS, "pad_token_id": None}  # fmt: skip
_DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜end▁of▁sentence｜>")
_FREE = gguf_kit.TOKENS.index("12")  # no other merge needs it
_MERGES = [m for m in gguf_kit.MERGES if m != "1 2"]
_TOKENS, _TYPES = "tokenizer__ggml__tokens", "tokenizer__ggml__token_type"


def imported(tmp_path: Path, arch: str, kind: str = "", **said: Any) -> tuple[Any, ImportResult]:
    model = random_model(kind or arch, **_OWN)
    path = gguf_kit.file_of(tmp_path / "m.gguf", model, arch, **said)
    result = write_folder(path, tmp_path / "m")
    return AutoTokenizer.from_pretrained(tmp_path / "m"), result


def with_token(text: str, kind: int) -> dict[str, Any]:
    """Metadata with one token exchanged."""
    tokens, types = list(gguf_kit.TOKENS), gguf_kit.tokenizer()["tokenizer.ggml.token_type"]
    tokens[_FREE], types[_FREE] = text, kind
    return {_TOKENS: tokens, _TYPES: types, "tokenizer__ggml__merges": _MERGES}


def pieces(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return found


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "starcoder2"])
def test_special_tokens_outside_the_byte_alphabet(tmp_path: Path, arch: str) -> None:
    tokens = [*gguf_kit.TOKENS[:-3], *_DEEPSEEK]
    ours, result = imported(tmp_path, arch, **{_TOKENS: tokens}, tokenizer__ggml__add_bos_token=True)  # fmt: skip
    first = gguf_kit.VOCAB - 3
    assert [pieces(ours, t) for t in _DEEPSEEK] == [[first], [first + 1], [first + 2]]
    assert (ours.bos_token_id, ours.eos_token_id, len(ours)) == (first, first + 2, gguf_kit.VOCAB)
    assert ours("hello").input_ids == [first, *pieces(ours, "hello")]
    assert pieces(ours, "a<｜User｜>b") == [*pieces(ours, "a"), first + 1, *pieces(ours, "b")]
    assert ours.decode([first + 1, gguf_kit.TOKENS.index("hell")]) == "<｜User｜>hell"
    assert ours.decode([first + 1], skip_special_tokens=True) == ""
    assert result.notes == ()


@pytest.mark.parametrize("kind", [3, 4], ids=["control", "user-defined"])
@pytest.mark.parametrize("text", ["<|end of text|>", "   ", "\n\n", "😀", "<think>", "▁x"])
def test_tokens_that_stand_for_their_text(tmp_path: Path, text: str, kind: int) -> None:
    ours, _ = imported(tmp_path, "llama", **with_token(text, kind))
    assert pieces(ours, text) == [_FREE]
    assert pieces(ours, f"he{text}hell") == [*pieces(ours, "he"), _FREE, *pieces(ours, "hell")]
    assert ours.decode([_FREE]) == text
    assert (ours.decode([_FREE], skip_special_tokens=True) == "") == (kind == 3)


def test_a_literal_token_and_its_spelling_are_two(tmp_path: Path) -> None:
    """The file has ``\\n\\n`` as a literal token and, spelled for bytes, as one of merges."""
    said = with_token("\n\n", 4)
    other = gguf_kit.TOKENS.index("Ġworld")
    said[_TOKENS][other] = "ĊĊ"
    said["tokenizer__ggml__merges"] = [m for m in _MERGES if m != "Ġwor ld"] + ["Ċ Ċ"]
    ours, _ = imported(tmp_path, "llama", **said)
    assert pieces(ours, "\n\n") == [_FREE]
    assert ours.convert_ids_to_tokens([_FREE, other]) == ["\n\n", "ĊĊ"]


def test_merges_that_spell_a_literal_token_are_left_out(tmp_path: Path) -> None:
    said = with_token("\n\n", 4)
    said["tokenizer__ggml__merges"] = [*_MERGES, "Ċ Ċ"]
    ours, _ = imported(tmp_path, "llama", **said)
    assert pieces(ours, "a\n\n\n") == [*pieces(ours, "a"), _FREE, *pieces(ours, "\n")]


@pytest.mark.parametrize(
    ("pre", "flag", "added"),
    [
        ("llama-bpe", None, True),
        ("tekken", None, True),
        ("llama-bpe", False, False),
        ("smollm", None, False),
        ("smollm", True, True),
    ],
)
def test_bos_by_the_splitting_rules(tmp_path: Path, pre: str, flag: bool | None, added: bool) -> None:  # fmt: skip
    ours, _ = imported(tmp_path, "llama", tokenizer__ggml__pre=pre, tokenizer__ggml__add_bos_token=flag)  # fmt: skip
    front = [gguf_kit.VOCAB - 3] if added else []
    assert ours("hello").input_ids == [*front, *pieces(ours, "hello")]


@pytest.mark.parametrize("arch", ["llama", "qwen3", "starcoder2"])
def test_whole_words_without_merges(tmp_path: Path, arch: str) -> None:
    """Llama 3's vocabulary has words that no merges make. Classes with rules of their own give way
    to the one that takes tokenizer.json as it is."""
    ours, result = imported(tmp_path, arch, **with_token("zebra", 1), tokenizer__ggml__pre="llama-bpe")  # fmt: skip
    assert pieces(ours, "zebra") == [_FREE]
    assert result.notes == ()


def test_other_rules_need_merges(tmp_path: Path) -> None:
    ours, _ = imported(tmp_path, "llama", **with_token("zebra", 1))
    assert len(pieces(ours, "zebra")) == len("zebra")


def test_rules_that_a_class_does_not_keep_are_named(tmp_path: Path) -> None:
    _, result = imported(tmp_path, "qwen2", tokenizer__ggml__pre="llama-bpe")
    (note,) = result.notes
    assert "rules 'llama-bpe', which transformers does not use for such a model; Qwen2Tokenizer's are used" in note  # fmt: skip


def test_rules_of_gpt2_of_a_class_with_its_own(tmp_path: Path) -> None:
    """Qwen2's class splits before each digit and GPT-2's rules do not; Qwen3's gives way."""
    _, result = imported(tmp_path, "qwen2", tokenizer__ggml__pre="smollm")
    assert "rules 'smollm', which transformers does not use for such a model; Qwen2Tokenizer's are used" in result.notes[0]  # fmt: skip
    (tmp_path / "other").mkdir()
    ours, result = imported(tmp_path / "other", "qwen3", tokenizer__ggml__pre="smollm")
    assert (pieces(ours, "12"), result.notes) == ([_FREE], ())


def test_unknown_rules_of_a_class_with_its_own(tmp_path: Path) -> None:
    """The note names the rules that are used."""
    for arch, used in (("qwen2", "Qwen2Tokenizer"), ("llama", "GPT-2")):
        (tmp_path / arch).mkdir()
        _, result = imported(tmp_path / arch, arch, tokenizer__ggml__pre="other")
        assert f"rules 'other', which transformers does not know; {used}'s are used" in result.notes[0]  # fmt: skip


def changed(key: str, change: Any) -> dict[str, Any]:
    return {key.replace(".", "__"): change(gguf_kit.tokenizer()[key])}


_MORE = {_TOKENS: [*gguf_kit.TOKENS, "<a>"], _TYPES: [1] * (gguf_kit.VOCAB + 1)}
WRONG: dict[str, tuple[dict[str, Any], type[LlmquantError], str]] = {
    "twice the same": (changed("tokenizer.ggml.tokens", lambda t: [*t[:-4], "he", *t[-3:]]), CheckpointError, "token 'he' is there twice, as 256 and 264"),
    "a merge of no token": (changed("tokenizer.ggml.merges", lambda m: [*m, "q z"]), CheckpointError, "merge 'q z' cannot be made, 'qz' is no token"),
    "a merge of three": (changed("tokenizer.ggml.merges", lambda m: [*m, "h e ll"]), CheckpointError, "merge 'h e ll' cannot be made, it has not two parts"),
    "merges of numbers": ({"tokenizer__ggml__merges": [1, 2]}, CheckpointError, "tokenizer.ggml.merges is no list of texts"),
    "eos past the tokens": ({"tokenizer__ggml__eos_token_id": gguf_kit.VOCAB}, CheckpointError, "eos_token_id is 268, and its 268 tokens end at 267"),
    "unknown past the tokens": ({"tokenizer__ggml__unknown_token_id": 4294967295}, CheckpointError, "unknown_token_id is 4294967295"),
    "more tokens than rows": (_MORE, CheckpointError, "has 269 tokens and embeddings of 268"),
    "few types": (changed("tokenizer.ggml.token_type", lambda t: t[:-1]), CheckpointError, "token_type is no list of 268 whole numbers"),
    "tokens as a text": ({_TOKENS: "abc"}, CheckpointError, "tokenizer.ggml.tokens is no list of texts"),
    "BOS with blanks in front": ({_TOKENS: [*gguf_kit.TOKENS[:-3], "<|a b|>", *gguf_kit.TOKENS[-2:]], "tokenizer__ggml__add_bos_token": True}, LayoutError, "cannot build its tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_tokens_that_make_no_sense(tmp_path: Path, name: str) -> None:
    said, error, message = WRONG[name]
    with pytest.raises(error) as told:
        imported(tmp_path, "llama", **said)
    assert message in str(told.value)
    assert "m.gguf" in str(told.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf"]


def test_a_tokenizer_that_loads_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "llmquant.checkpoint.gguf.tokens.tokenizer._mended", lambda _s, _v, data: data
    )
    said = with_token("<｜User｜>", 3)
    with pytest.raises(LayoutError, match="its token 264, '<｜User｜>', is"):
        imported(tmp_path, "llama", **said)
    assert not (tmp_path / "m").exists()


def test_fewer_tokens_than_rows(tmp_path: Path) -> None:
    tokens = list(gguf_kit.TOKENS[:-3])
    none = dict.fromkeys(("tokenizer__ggml__bos_token_id", "tokenizer__ggml__padding_token_id"))
    ours, _ = imported(tmp_path, "llama", **{_TOKENS: tokens, "tokenizer__ggml__eos_token_id": 7, **none})  # fmt: skip
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (None, 7, None)
    assert len(ours) == len(tokens)


# --- sentencepiece


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Any]:
    """Small models of the library itself, by whether they put a space in front."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    text = Path(__file__).parents[2] / "examples" / "tiny-llama" / "heldout.txt"
    (folder / "t.txt").write_text(text.read_text(encoding="utf-8")[:20000], encoding="utf-8")
    for space in (True, False):
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "t.txt"), model_prefix=str(folder / f"{space}"), vocab_size=400, model_type="bpe",
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            add_dummy_prefix=space, minloglevel=2, num_threads=1,
        )  # fmt: skip
    return {s: sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{s}.model")) for s in (True, False)}  # fmt: skip


def of_sentencepiece(model: Any) -> dict[str, Any]:
    kinds = ((model.is_unknown, 2), (model.is_control, 3), (model.is_byte, 6))
    count = model.vocab_size()
    return {
        "tokenizer__ggml__model": "llama",
        "tokenizer__ggml__pre": "default",
        _TOKENS: [model.id_to_piece(i) for i in range(count)],
        "tokenizer__ggml__scores": [float(model.get_score(i)) for i in range(count)],
        _TYPES: [next((kind for test, kind in kinds if test(i)), 1) for i in range(count)],
        "tokenizer__ggml__bos_token_id": 1,
        "tokenizer__ggml__eos_token_id": 2,
        "tokenizer__ggml__unknown_token_id": 0,
        **dict.fromkeys(("tokenizer__ggml__padding_token_id", "tokenizer__ggml__add_bos_token", "tokenizer__ggml__merges")),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "space"),
    [("llama", True), ("llama", False), ("phi3", True), ("phi3", False), ("gemma2", False)],
)
def test_sentencepiece_with_and_without_a_space_in_front(
    tmp_path: Path, models: dict[bool, Any], kind: str, space: bool
) -> None:
    theirs = models[space]
    own = {**_OWN, "vocab_size": theirs.vocab_size(), "tie_word_embeddings": kind == "gemma2"}
    path = gguf_kit.file_of(
        tmp_path / "m.gguf", random_model(kind, **own), kind, **of_sentencepiece(theirs),
        **({} if space else {"tokenizer__ggml__add_space_prefix": False}),
    )  # fmt: skip
    write_folder(path, tmp_path / "m")
    ours = AutoTokenizer.from_pretrained(tmp_path / "m")
    texts = ["hello world", "a\nb\n\n c", "tab\there", "日本語 ü 😀", "1999.", "", "end  "]
    for text in [*texts, " one space", "  two spaces", "   "]:
        ids = theirs.encode(text)
        assert ours(text).input_ids == [1, *ids], text
        assert ours.decode(ids) == theirs.decode(ids), text
    assert pieces(ours, "<s></s><unk>") == [1, 2, 0]
    assert pieces(ours, "<s>hello</s> you") == [
        1,
        *theirs.encode("hello"),
        2,
        *theirs.encode(" you"),
    ]
    assert max(ours.get_vocab().values()) < theirs.vocab_size()
    settings = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert settings.get("mask_token") is None


def test_sentencepiece_ids_that_the_file_does_not_name(
    tmp_path: Path, models: dict[bool, Any]
) -> None:
    """llama.cpp takes 0, 1 and 2 then."""
    theirs = models[True]
    none = dict.fromkeys(f"tokenizer__ggml__{name}_token_id" for name in ("bos", "eos", "unknown"))
    own = {**_OWN, "vocab_size": theirs.vocab_size()}
    said = {**of_sentencepiece(theirs), **none}
    path = gguf_kit.file_of(tmp_path / "m.gguf", random_model("llama", **own), "llama", **said)
    write_folder(path, tmp_path / "m")
    ours = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert (ours.unk_token_id, ours.bos_token_id, ours.eos_token_id) == (0, 1, 2)
    assert ours("hello").input_ids == [1, *theirs.encode("hello")]
    assert json.loads((tmp_path / "m" / "config.json").read_text())["eos_token_id"] == 2


def test_sentencepiece_that_a_class_spells_in_bytes_is_refused(
    tmp_path: Path, models: dict[bool, Any]
) -> None:
    """transformers loads Qwen2's class for a Qwen2, whatever the folder says; Qwen3's gives way."""
    theirs = models[True]
    own = {**_OWN, "vocab_size": theirs.vocab_size()}
    for kind in ("qwen2", "qwen3"):
        gguf_kit.file_of(tmp_path / f"{kind}.gguf", random_model(kind, **own), kind, **of_sentencepiece(theirs))  # fmt: skip
    with pytest.raises(LayoutError, match="its sentencepiece tokenizer is no Qwen2Tokenizer"):
        write_folder(tmp_path / "qwen2.gguf", tmp_path / "m")
    write_folder(tmp_path / "qwen3.gguf", tmp_path / "m")
    ours = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert ours("hello  日本").input_ids == [1, *theirs.encode("hello  日本")]


def test_what_no_piece_spells_is_unknown(tmp_path: Path, models: dict[bool, Any]) -> None:
    """A vocabulary without bytes, whose library says that it is unknown too."""
    said = of_sentencepiece(models[True])
    said[_TOKENS] = [f"[{t}]" if t.startswith("<0x") else t for t in said[_TOKENS]]
    said[_TYPES] = [5 if kind == 6 else kind for kind in said[_TYPES]]
    own = {**_OWN, "vocab_size": len(said[_TOKENS])}
    path = gguf_kit.file_of(tmp_path / "m.gguf", random_model("llama", **own), "llama", **said)
    write_folder(path, tmp_path / "m")
    ours = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert ours("a日b").input_ids == [1, *pieces(ours, "a"), 0, *models[True].encode("xb")[-1:]]


def test_runs_of_spaces_of_gemma(tmp_path: Path, models: dict[bool, Any]) -> None:
    """llama.cpp's converter writes Gemma's user-defined runs with spaces; its merges make them."""
    said = of_sentencepiece(models[False])
    runs = [" " * n for n in range(2, 9)]
    first = len(said[_TOKENS])
    said[_TOKENS] += [*runs, "\n\n", "<table>"]
    said[_TYPES] += [4] * (len(runs) + 2)
    said["tokenizer__ggml__scores"] += [-1000.0] * (len(runs) + 2)
    own = {**_OWN, "vocab_size": len(said[_TOKENS]), "tie_word_embeddings": True}
    path = gguf_kit.file_of(tmp_path / "m.gguf", random_model("gemma2", **own), "gemma2", **said)
    write_folder(path, tmp_path / "m")
    ours = AutoTokenizer.from_pretrained(tmp_path / "m")
    for i, text in enumerate(said[_TOKENS][first:], first):
        assert pieces(ours, text) == [i]
        assert pieces(ours, f"x{text}x") == [*pieces(ours, "x"), i, *pieces(ours, "x")]


def test_a_user_defined_piece_that_no_merge_makes_is_told(
    tmp_path: Path, models: dict[bool, Any]
) -> None:
    """A run of spaces without the shorter ones. The model can be used, so this is no refusal."""
    said = of_sentencepiece(models[False])
    first = len(said[_TOKENS])
    said[_TOKENS] += [" " * 7]
    said[_TYPES] += [4]
    said["tokenizer__ggml__scores"] += [-1000.0]
    own = {**_OWN, "vocab_size": len(said[_TOKENS]), "tie_word_embeddings": True}
    path = gguf_kit.file_of(tmp_path / "m.gguf", random_model("gemma2", **own), "gemma2", **said)
    result = write_folder(path, tmp_path / "m")
    assert any(f"'       ' ({first})" in note and "user-defined" in note for note in result.notes)
