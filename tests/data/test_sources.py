"""Every text comes through one door: what it lets in, what it counts, what it refuses."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest

from llmquant.data import hub_datasets as hub_text
from llmquant.data import local_files as local_text
from llmquant.data import sources
from llmquant.data.chats import Chat, Message
from llmquant.data.sources import Documents, Source, parse_source, read_documents
from llmquant.errors import SourceError

WIKITEXT_ROWS = Path(__file__).parents[1] / "data" / "wikitext2_test_rows_0_200.json"
HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
CHAT = Chat((Message("user", "hi"), Message("assistant", "hello")))


# ---------------------------------------------------------------- the grammar


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("hf:D:train", Source("hf", "D", None, None, "train"), id="split"),
        pytest.param(
            "hf:D:anything",
            Source("hf", "D", None, None, "anything"),
            id="one part is a split whatever its name",
        ),
        pytest.param(
            "hf:org/D:en:train", Source("hf", "org/D", None, "en", "train"), id="config and split"
        ),
        pytest.param(
            "hf:D:train:body", Source("hf", "D", "body", None, "train"), id="split and field"
        ),
        pytest.param(
            "hf:D:test_sft:messages",
            Source("hf", "D", "messages", None, "test_sft"),
            id="split with suffix",
        ),
        pytest.param(
            "hf:D:text:validation",
            Source("hf", "D", None, "text", "validation"),
            id="config named like a field",
        ),
        pytest.param("hf:D:en:train:url", Source("hf", "D", "url", "en", "train"), id="all four"),
        pytest.param("hf:D:a:b:c", Source("hf", "D", "c", "a", "b"), id="all four, odd names"),
        pytest.param("hf:D::all:text", Source("hf", "D", "text", None, "all"), id="empty config"),
        pytest.param(
            "hf:D::all", Source("hf", "D", None, None, "all"), id="empty config, no field"
        ),
        pytest.param(
            "hf:D:train[:10]", Source("hf", "D", None, None, "train[:10]"), id="colon in a slice"
        ),
        pytest.param(
            "hf:D:en:train[5:10]:x",
            Source("hf", "D", "x", "en", "train[5:10]"),
            id="slice and field",
        ),
        pytest.param(
            "hf:D:en:train+test", Source("hf", "D", None, "en", "train+test"), id="two splits"
        ),
        pytest.param("hf:/a/b:train", Source("hf", "/a/b", None, None, "train"), id="folder"),
        pytest.param("file:a b#c.txt", Source("file", "a b#c.txt"), id="file takes the whole path"),
        pytest.param("jsonl:a.jsonl", Source("jsonl", "a.jsonl"), id="jsonl"),
        pytest.param(
            "jsonl:a.jsonl#messages", Source("jsonl", "a.jsonl", "messages"), id="jsonl with field"
        ),
        pytest.param("json:a.json#q", Source("json", "a.json", "q"), id="json with field"),
    ],
)
def test_grammar(text: str, expected: Source) -> None:
    assert parse_source(text) == expected
    assert parse_source(str(expected)) == expected  # the canonical form means the same


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("hf:", "does not name a dataset and a split", id="nothing"),
        pytest.param("hf:D", "does not name a dataset and a split", id="no split"),
        pytest.param("hf:D:", "does not name a dataset and a split", id="empty split"),
        pytest.param("hf::train", "does not name a dataset and a split", id="no name"),
        pytest.param("hf:D:a:b:c:d", "does not name a dataset and a split", id="five parts"),
        pytest.param(
            "hf:D:en::text",
            "leaves the split empty; write hf:NAME::SPLIT:FIELD",
            id="four parts, empty split",
        ),
        pytest.param(
            "hf:D:train:test",
            "ambiguous: both of 'train' and 'test' look like a split",
            id="both splits",
        ),
        pytest.param(
            "hf:D:a:b",
            "neither of 'a' and 'b' looks like a split.*hf:D::a:b or hf:D:a:b:text",
            id="no split-like",
        ),
        pytest.param("file:", "names no path", id="file without path"),
        pytest.param("jsonl:", "names no path", id="jsonl without path"),
        pytest.param(
            "no-such-file.txt",
            "neither an existing file nor a source; write hf:",
            id="bare, missing",
        ),
        pytest.param("s3:bucket/x", "neither an existing file nor a source", id="unknown scheme"),
        pytest.param("", "is a folder|neither an existing file", id="empty"),
    ],
)
def test_grammar_refuses(text: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        parse_source(text)


@pytest.mark.parametrize(
    ("name", "suffix", "expected"),
    [
        pytest.param("a.jsonl", "", ("jsonl", None), id="jsonl"),
        pytest.param("a.ndjson", "#q", ("jsonl", "q"), id="ndjson with field"),
        pytest.param("a.json", "", ("json", None), id="json"),
        pytest.param("a.CSV", "", ("csv", None), id="csv"),
        pytest.param("a.tsv", "#q", ("csv", "q"), id="tsv with field"),
        pytest.param("a.parquet", "#q", ("parquet", "q"), id="parquet with field"),
        pytest.param("a.txt", "", ("file", None), id="txt"),
        pytest.param("a", "", ("file", None), id="no suffix"),
        pytest.param("a#1.txt", "", ("file", None), id="a hash in an existing name"),
    ],
)
def test_bare_path_by_suffix(
    tmp_path: Path, name: str, suffix: str, expected: tuple[str, str | None]
) -> None:
    (tmp_path / name).write_text("x")
    parsed = parse_source(f"{tmp_path / name}{suffix}")
    assert ((parsed.kind, parsed.field), parsed.name) == (expected, str(tmp_path / name))


def test_bare_folder_says_how_to_name_a_split(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f"is a folder; name a split of it, hf:{tmp_path}:train"):
        parse_source(str(tmp_path))


# ---------------------------------------------------------------- local files


def lines(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


@pytest.mark.parametrize(
    ("source", "data", "rows", "dropped"),
    [
        pytest.param(
            "file:F",
            "a\r\n\n é ".encode(),
            ["a\r\n\n é "],
            {},
            id="a file is exact: CRLF and spaces stay",
        ),
        pytest.param("file:F", b"\xef\xbb\xbfa", ["a"], {}, id="byte order mark goes"),
        pytest.param(
            "jsonl:F", lines({"text": "a"}, {"text": ""}), ["a", ""], {}, id="empty rows stay"
        ),
        pytest.param(
            "jsonl:F",
            b'\xef\xbb\xbf{"text":"a"}\r\n\n{"text":"b"}',
            ["a", "b"],
            {},
            id="blank lines, no last newline",
        ),
        pytest.param(
            "jsonl:F", '{"text":"a\u2028b"}\n'.encode(), ["a\u2028b"], {}, id="U+2028 ends no line"
        ),
        pytest.param("jsonl:F", lines("a", "b"), ["a", "b"], {}, id="bare strings"),
        pytest.param(
            "jsonl:F", lines({"messages": HI}), [CHAT], {}, id="messages found by default"
        ),
        pytest.param(
            "jsonl:F", lines({"messages": HI, "text": "t"}), ["t"], {}, id="text before messages"
        ),
        pytest.param(
            "jsonl:F#messages", lines({"messages": HI, "text": "t"}), [CHAT], {}, id="field by name"
        ),
        pytest.param(
            "jsonl:F#turns", lines({"turns": HI}), [CHAT], {}, id="a chat under another name"
        ),
        pytest.param(
            "jsonl:F", lines({"text": "a"}, {"x": 1}), ["a"], {"missing field": 1}, id="missing"
        ),
        pytest.param(
            "jsonl:F", lines({"text": "a"}, {"text": None}), ["a"], {"null": 1}, id="null"
        ),
        pytest.param(
            "jsonl:F",
            lines({"text": "a"}, {"text": 1}, {"text": {}}),
            ["a"],
            {"neither text nor chat": 2},
            id="wrong type",
        ),
        pytest.param(
            "jsonl:F", lines({"text": "a"}, [1], 2), ["a"], {"not an object": 2}, id="not objects"
        ),
        pytest.param(
            "jsonl:F#text",
            lines({"text": "a"}, "b"),
            ["a"],
            {"not an object": 1},
            id="string, though a field is named",
        ),
        pytest.param(
            "jsonl:F",
            lines({"text": "a"}, {"text": "\ud800"}),
            ["a"],
            {"not Unicode": 1},
            id="lone surrogate",
        ),
        pytest.param(
            "jsonl:F",
            lines({"messages": HI}, {"messages": []}),
            [CHAT],
            {"no messages": 1},
            id="no turns",
        ),
        pytest.param(
            "jsonl:F",
            lines(
                {"messages": HI},
                {"messages": [{"from": "human", "value": "x"}]},
                {"messages": ["x"]},
            ),
            [CHAT],
            {"neither text nor chat": 2},
            id="turns of another shape",
        ),
        pytest.param(
            "jsonl:F",
            lines(
                {"messages": HI},
                {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
                {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}]},
            ),
            [CHAT],
            {"a turn that is not plain text": 1, "a tool call without a name": 1},
            id="a picture and a broken tool call",
        ),
        pytest.param(
            "jsonl:F",
            lines({"messages": HI}, {"messages": [{"role": "user", "content": "\udfff"}]}),
            [CHAT],
            {"not Unicode": 1},
            id="lone surrogate in a turn",
        ),
        pytest.param(
            "json:F",
            json.dumps(["a", "", "b"]).encode(),
            ["a", "", "b"],
            {},
            id="json list of strings",
        ),
        pytest.param(
            "json:F#q",
            json.dumps([{"q": "a"}, {"q": "b"}]).encode(),
            ["a", "b"],
            {},
            id="json list of objects",
        ),
    ],
)
def test_local_rows(
    tmp_path: Path, source: str, data: bytes, rows: list[object], dropped: dict[str, int]
) -> None:
    path = tmp_path / "data"
    path.write_bytes(data)
    documents = read_documents(source.replace(":F", f":{path}"))
    assert documents.rows == tuple(rows)
    assert documents.dropped == dropped
    assert documents.rows_read == len(rows) + sum(dropped.values())


@pytest.mark.parametrize(
    ("source", "data", "message"),
    [
        pytest.param(
            "jsonl:F",
            b'{"text":"a"}\n\n{"text":\n',
            r"F:3 is not JSON: .*; correct or delete it",
            id="bad line named",
        ),
        pytest.param(
            "jsonl:F", b'{"text":"a"}\n"\xff"\n', "F:2 is not UTF-8 at byte 1", id="bad bytes named"
        ),
        pytest.param("jsonl:F", b"[" * 200_000, "F:1 is not JSON", id="nested too deep"),
        pytest.param(
            "file:F", b"ab\xff", "F is not UTF-8 at byte 2; convert it", id="file not UTF-8"
        ),
        pytest.param("json:F", b"[1", "F is not JSON", id="json broken"),
        pytest.param(
            "json:F", b"{}", "F holds a JSON dict, not a list; use jsonl:", id="json not a list"
        ),
        pytest.param("jsonl:F", b"", "no row of text: no records at all", id="empty jsonl"),
        pytest.param("json:F", b"[]", "no row of text: no records at all", id="empty list"),
        pytest.param("file:F", b" \n", "no row of text: 1 empty", id="white space only"),
        pytest.param(
            "jsonl:F#body",
            lines({"text": "a", "url": "b"}),
            "has no field 'body'; its fields: text, url",
            id="field",
        ),
        pytest.param(
            "jsonl:F",
            lines({"a": 1, "b": 2}),
            "no field 'text' or 'messages'; its fields: a, b",
            id="default fields",
        ),
        pytest.param(
            "jsonl:F",
            lines({"text": 1}, {"text": None}),
            "1 neither text nor chat, 1 null",
            id="nothing usable",
        ),
        ("csv:F", b"text,text\na,b\n", r"F: its first line must name every column, each once"),
        ("csv:F", b"text,\na,b\n", r"F: its first line must name every column, each once"),
        ("csv:F", b"text\na, b\n", r"F:2 has 2 values for 1 columns; .*plain text: file:F"),
        ("csv:F", b'text\n"a\n', r"F:2 is not CSV: unexpected end of data; correct it"),
        ("csv:F", b"id\n1\n", r"has no field 'text' or 'messages'; its fields: id"),
        ("csv:F", b"text\n\xff\n", r"F is not UTF-8 at byte 5"),
        ("csv:F", b"", r"contains no row of text: no records at all"),
        ("parquet:F", b"text\na\n", r"F cannot be read as Parquet: .*; check the file"),
        ("parquet:F", b"", r"F cannot be read as Parquet: .*; check the file"),
    ],
)
def test_local_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, data: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("F").write_bytes(data)
    with pytest.raises(SourceError, match=message):
        read_documents(source)


@pytest.mark.parametrize("kind", ["file", "jsonl", "json", "csv", "parquet"])
def test_missing_file(kind: str) -> None:
    with pytest.raises(
        SourceError, match="nowhere cannot be read: No such file or directory; check the path"
    ):
        read_documents(f"{kind}:nowhere")


@pytest.mark.parametrize(
    ("name", "data", "rows", "dropped"),
    [
        pytest.param(
            "t.csv",
            b'\xef\xbb\xbfid,text\r\n1,"a, ""b""\r\nc"\r\n2, NA \r\n3,1.0\r\n4\r\n\r\n5,\r\n',
            ['a, "b"\r\nc', " NA ", "1.0", ""],
            {"null": 1},
            id="values are texts, as they stand; a short row has none",
        ),
        pytest.param("t.tsv", b"text\tn\na, b\t1\n", ["a, b"], {}, id="tabs"),
    ],
)
def test_tables_of_text(
    tmp_path: Path, name: str, data: bytes, rows: list[str], dropped: dict[str, int]
) -> None:
    (tmp_path / name).write_bytes(data)
    read = read_documents(str(tmp_path / name))
    assert (list(read.rows), dict(read.dropped)) == (rows, dropped)
    assert read.source == f"csv:{tmp_path / name}#text"


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["a", None, "b"], "chat": [HI, None, HI], "n": [1, 2, 3]}), path
    )
    texts, chats = read_documents(str(path)), read_documents(f"parquet:{path}#chat")
    assert (texts.rows, dict(texts.dropped)) == (("a", "b"), {"null": 1})
    assert (chats.rows, dict(chats.dropped)) == ((CHAT, CHAT), {"null": 1})
    with pytest.raises(SourceError, match=r"has no field 'q'; its fields: text, chat, n"):
        read_documents(f"{path}#q")
    latin = pyarrow.array([b"\xff"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": latin}), path)
    with pytest.raises(SourceError, match=r"cannot be read as Parquet: .*utf-8.*; check the file"):
        read_documents(str(path))


def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "x" * 60}, {"text": "y" * 60}))
    for module in (local_text, sources):
        monkeypatch.setattr(module, "MAX_BYTES", 100)
    with pytest.raises(SourceError, match="GiB of text; name a smaller file"):
        read_documents(f"jsonl:{path}")
    with pytest.raises(SourceError, match="GiB; cut it, or use jsonl:"):
        read_documents(f"file:{path}")
    assert read_documents(f"jsonl:{path}", limit=1).rows == ("x" * 60,)


# ---------------------------------------------------------------- Documents


def test_limit_counts_records(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "a"}, {"x": 1}, {"text": "c"}, {"text": "d"}))
    documents = read_documents(str(path), limit=3)
    assert (documents.rows, documents.rows_read, documents.dropped) == (
        ("a", "c"),
        3,
        {"missing field": 1},
    )
    with pytest.raises(SourceError, match="a limit of 0 rows"):
        read_documents(str(path), limit=0)


def test_source_is_canonical(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "a"}))
    assert read_documents(str(path)).source == f"jsonl:{path}#text"


def test_duplicates_and_empty_rows_are_counted() -> None:
    documents = Documents.of(["a", "", "a", " ", "", CHAT, CHAT, "b"], "memory")
    assert (documents.duplicates, documents.empty, documents.rows_read) == (2, 3, 8)


def test_sha256_is_that_of_the_rows_as_json_lines() -> None:
    documents = Documents.of(["é\n", CHAT], "memory")
    written = (
        '"é\\n"\n[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]\n'
    )
    assert documents.sha256 == hashlib.sha256(written.encode()).hexdigest()
    assert documents.sha256 == "5fd3f5bf4f637d09a5b356f9d9cfc11eb20d38f2cf4bbecb213c0ed1bcdda9eb"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(["ab", "c"], ["a", "bc"], id="the border between rows"),
        pytest.param(["a"], ["a", ""], id="an empty row"),
        pytest.param(["a", "b"], ["b", "a"], id="the order"),
        pytest.param([CHAT], ["hihello"], id="a chat"),
    ],
)
def test_sha256_tells_apart(one: list[Any], other: list[Any]) -> None:
    assert Documents.of(one, "m").sha256 != Documents.of(other, "m").sha256


def test_text_joins_all_rows_by_two_newlines() -> None:
    assert Documents.of(["", " = A = \n", "", "b"], "memory").text() == "\n\n = A = \n\n\n\n\nb"


def test_text_of_chats_is_refused() -> None:
    with pytest.raises(
        SourceError, match="memory: 1 of 2 rows are chats, not plain text; name a field"
    ):
        Documents.of(["a", CHAT], "memory").text()


def test_wikitext_rows_keep_their_empty_ones() -> None:
    documents = read_documents(str(WIKITEXT_ROWS))
    text = documents.text()
    assert (len(documents.rows), documents.empty, documents.dropped) == (200, 76, {})
    assert text.startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is an English film")
    assert text == "\n\n".join(json.loads(WIKITEXT_ROWS.read_text(encoding="utf-8")))


def test_import_is_light() -> None:
    code = "import sys, llmquant.data.sources; print(sorted({'torch', 'datasets', 'transformers'} & set(sys.modules)))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


# ---------------------------------------------------------------- datasets


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network, and a cache of one's own."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture
def folder(tmp_path: Path, cache: Path) -> Path:
    """One split, as datasets writes it."""
    path = tmp_path / "set"
    path.mkdir()
    rows = {"text": ["a", "", "c", None], "messages": [HI] * 4, "body": ["x", "y", "z", "w"]}
    datasets.Dataset.from_dict(rows).to_json(path / "train.jsonl")
    return path


@pytest.mark.parametrize(
    ("rest", "rows", "canonical"),
    [
        pytest.param("train", ["a", "", "c"], ":train:text", id="text by default"),
        pytest.param("train:body", ["x", "y", "z", "w"], ":train:body", id="field"),
        pytest.param("train:messages", [CHAT] * 4, ":train:messages", id="chats"),
        pytest.param("train[1:3]:body", ["y", "z"], ":train[1:3]:body", id="slice by rows"),
        pytest.param("train[:1]:body", ["x"], ":train[:1]:body", id="slice from the start"),
        pytest.param("train[2:]:body", ["z", "w"], ":train[2:]:body", id="slice to the end"),
        pytest.param("train[:50%]:body", ["x", "y"], ":train[:50%]:body", id="slice by percent"),
        pytest.param("train[-1:]:body", ["w"], ":train[-1:]:body", id="slice from the end"),
        pytest.param("default:train:body", ["x", "y", "z", "w"], "default:train:body", id="config"),
    ],
)
def test_hf_folder(folder: Path, rest: str, rows: list[object], canonical: str) -> None:
    documents = read_documents(f"hf:{folder}:{rest}")
    assert documents.rows == tuple(rows)
    assert documents.source == f"hf:{folder}:{canonical}"
    assert read_documents(documents.source).sha256 == documents.sha256


def test_hf_counts_null_and_stops_at_the_limit(folder: Path) -> None:
    assert read_documents(f"hf:{folder}:train").dropped == {"null": 1}
    assert read_documents(f"hf:{folder}:train", limit=2).rows == ("a", "")


def test_hf_parquet(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"text": ["a", "b"], "n": [1, 2]}).to_parquet(
        tmp_path / "set" / "test.parquet"
    )
    assert read_documents(f"hf:{tmp_path / 'set'}:test").rows == ("a", "b")


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        pytest.param(
            "validation", r"Bad split: validation. Available splits: \['train'\]", id="split"
        ),
        pytest.param("validation[:50%]", "cannot be read: Unknown split", id="sliced split"),
        pytest.param("en:train", "BuilderConfig 'en' not found. Available:", id="config"),
        pytest.param(
            "train:nope", "has no field 'nope'; its fields: text, messages, body", id="field"
        ),
        pytest.param("train:body", "not JSON|parse error", id="broken file"),
    ],
)
def test_hf_errors(folder: Path, rest: str, message: str, request: pytest.FixtureRequest) -> None:
    if "broken" in request.node.callspec.id:
        (folder / "train.jsonl").write_text('{"body": "x"}\n{"body"\n')
    with pytest.raises(SourceError, match=message):
        read_documents(f"hf:{folder}:{rest}")


def test_hf_default_field_lists_what_there_is(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(lines({"question": "a", "answer": "b"}))
    with pytest.raises(
        SourceError, match="has no field 'text' or 'messages'; its fields: question, answer"
    ):
        read_documents(f"hf:{tmp_path / 'set'}:train")


def test_hf_unknown_name_offline(cache: Path) -> None:
    with pytest.raises(
        SourceError, match=r"hf:no/such::train cannot be read: Couldn't reach .* use a local copy"
    ):
        read_documents("hf:no/such:train")


@pytest.mark.parametrize(
    ("size", "split", "outcome"),
    [
        pytest.param(1000, "train", "prepared", id="small: downloaded and cached"),
        pytest.param(1000, "train[:50%]", "prepared", id="small, by percent"),
        pytest.param(900 << 30, "train", "streamed", id="large: streamed"),
        pytest.param(900 << 30, "train[0:2]", "streamed", id="large, by rows"),
        pytest.param(
            900 << 30, "train[:50%]", "of 900 GiB; give row numbers", id="large, by percent"
        ),
        pytest.param(None, "train", "streamed", id="unknown size: streamed"),
        pytest.param(
            None,
            "train[-2:]",
            "whose size is unknown; give row numbers",
            id="unknown, from the end",
        ),
    ],
)
def test_hf_prepares_the_small_and_streams_the_large(
    folder: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: int | None,
    split: str,
    outcome: str,
) -> None:
    """A folder stands in for the hub: the same builder, under a name that is no folder, with a size
    of our choice."""
    real = datasets.load_dataset_builder

    def builder_of_size(name: str, config: str | None) -> Any:
        assert name == "org/name"
        builder = real(str(folder), config)
        builder.info.dataset_size = size
        return builder

    monkeypatch.setattr(hub_text.datasets, "load_dataset_builder", builder_of_size)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    if outcome in ("prepared", "streamed"):
        documents = read_documents(f"hf:org/name:{split}:body")
        assert documents.rows == (("x", "y", "z", "w") if split == "train" else ("x", "y"))
        assert any(cache.rglob("*.arrow")) == (outcome == "prepared")
    else:
        with pytest.raises(SourceError, match=outcome):
            read_documents(f"hf:org/name:{split}:body")
