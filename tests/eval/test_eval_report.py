"""The Report as JSON: nothing lost, nothing unknown accepted; and what is rendered from it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmquant.errors import LlmquantError, UsageError
from llmquant_eval.report.card import END, START, measured_section, splice, write_card
from llmquant_eval.report.results import Cost, Metric, ModelResult
from llmquant_eval.report.schema import (
    Hardware,
    NoiseFloor,
    Report,
    ReportText,
    Settings,
    read_report,
)
from llmquant_eval.report.table import HEADERS, footnotes, row, size, speed, with_error
from llmquant_eval.report.terminal import render


def metric(value: float, error: float | None, unit: Any, protocol: str = "kl/top-512") -> Metric:
    return Metric(
        protocol=protocol, unit=unit, value=value, standard_error=error, tokens=61320, windows=120
    )


def result(label: str, role: Any, **more: Any) -> ModelResult:
    metrics = {"perplexity": metric(37.3358123456789, 0.8968, "perplexity", "ppl/gptq-512")}
    if role == "candidate":
        metrics |= {
            "perplexity_ratio": metric(1.07023, 0.00184, "ratio", "ppl/gptq-512"),
            "kl_mean": metric(0.06688, 0.00082, "nats"), "kl_median": metric(0.0492, None, "nats"),
            "kl_p99": metric(0.347, None, "nats"), "kl_max": metric(2.109, None, "nats"),
            "top1_agreement": metric(0.80708, 0.00203, "share"),
            "rms_delta_p": metric(0.0598, 0.0007, "probability"),
        }  # fmt: skip
    cost = Cost(
        load_seconds=0.41,
        prefill_tokens_per_second=22818.2,
        decode_tokens_per_second=33.77,
        prompt_tokens=512,
        new_tokens=64,
        repeats=3,
        threads=2,
        peak_memory_bytes=446_623_744,
        memory_floor_bytes=352_063_488,
        device_peak_bytes=None,
    )
    fields: dict[str, Any] = {
        "label": label,
        "role": role,
        "source": f"out/{label}",
        "weights_sha256": "a" * 64,
        "tokenizer_sha256": "b" * 64,
        "recipe_sha256": None,
        "scheme": "W4 g128 sym",
        "quantized_linears": 42,
        "linears": 42,
        "parameters": 5_800_000,
        "bytes_on_disk": 3_456_789,
        "bits_per_weight": 4.125,
        "kernels": {"reference": 42},
        "metrics": metrics,
        "excluded_tokens": 0,
        "cost": cost,
    }
    return ModelResult(**fields | more)


def report(*models: ModelResult) -> Report:
    floor = NoiseFloor(
        other_dtype="float32",
        kl_mean=metric(2.1e-4, 3e-6, "nats"),
        top1_agreement=metric(0.983, 0.001, "share"),
    )
    return Report(
        created=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        command="llmquant eval out/small --text file:t.txt",
        protocols=["ppl/gptq-512", "kl/top-512"],
        text=ReportText(
            source="file:t.txt",
            sha256="c" * 64,
            tokens=124008,
            windows=120,
            windows_available=242,
            window=512,
        ),
        settings=Settings(dtype="bfloat16", device="cpu", kernel="auto", batch_size=None),
        reference="base",
        noise_floor=floor,
        models=list(models) or [result("base", "reference"), result("small", "candidate")],
        versions={"python": "3.11.7", "torch": "2.13.0"},
        hardware=Hardware(
            processor="A CPU", cores=2, threads=2, memory_bytes=2**34, accelerator=None
        ),
    )


def test_json_and_back() -> None:
    original = report()
    assert Report.from_json(original.to_json()) == original
    assert (
        json.loads(original.to_json())["models"][0]["metrics"]["perplexity"]["value"]
        == 37.3358123456789
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda d: d.update(schema_version=2), "schema_version 2", id="a later schema"),
        pytest.param(lambda d: d.pop("schema_version"), "schema_version None", id="no schema"),
        pytest.param(lambda d: d.update(surprise=1), "surprise", id="an unknown field"),
        pytest.param(
            lambda d: d["models"][0].update(surprise=1),
            r"models\.0\.surprise",
            id="an unknown field inside",
        ),
        pytest.param(lambda d: d.pop("hardware"), "hardware: Field required", id="a missing field"),
        pytest.param(
            lambda d: d.update(reference="other"),
            "reference: 'other' is none",
            id="no such reference",
        ),
        pytest.param(lambda d: d["text"].update(sha256="abc"), r"text\.sha256", id="no hash"),
        pytest.param(
            lambda d: d.update(created="2026-01-02T03:04:05"), "created", id="a time without a zone"
        ),
        pytest.param(
            lambda d: d["models"][0]["metrics"]["perplexity"].update(value=float("nan")),
            "finite",
            id="NaN",
        ),
    ],
)
def test_what_is_no_report_is_refused_by_name(change: Any, message: str, tmp_path: Path) -> None:
    raw = json.loads(report().to_json())
    change(raw)
    path = tmp_path / "r.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(UsageError, match=message) as caught:
        read_report(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"\xff", None], ids=["not JSON", "a list", "not UTF-8", "no file"]
)
def test_what_is_no_json_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"r\.json"):
        read_report(path)


@pytest.mark.parametrize(
    ("value", "error", "scale", "expected"),
    [
        (37.3358, 0.8968, 1, ("37.34", "±0.90")),
        (1.070231, 0.00184, 1, ("1.0702", "±0.0018")),
        (0.0668828, 0.000822, 1, ("0.06688", "±0.00082")),
        (0.807078, 0.00203, 100, ("80.71", "±0.20")),
        (5432.1, 123.4, 1, ("5432", "±123")),
        (0.347370, None, 1, ("0.3474", "")),
        (1.0, 0.0, 1, ("1", "")),
        (7.1234e-6, 2.5e-7, 1, ("7.12e-06", "±0.25e-06")),
        (-3.2e-9, 4.1e-9, 1, ("-3.2e-09", "±4.1e-09")),
        (0.0, 1.3e-5, 1, ("0.000000", "±0.000013")),
    ],
)
def test_a_value_is_given_to_the_place_of_its_error(
    value: float, error: float | None, scale: float, expected: tuple[str, str]
) -> None:
    assert with_error(value, error, scale) == expected


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(999, "999 B"), (11_500_000, "11.5 MB"), (999_600, "1 MB"), (4.2e9, "4.2 GB"), (3e12, "3 TB")],
)
def test_size(nbytes: float, text: str) -> None:
    assert size(nbytes) == text


@pytest.mark.parametrize(
    ("rate", "text"), [(22818.2, "22818"), (99.95, "100"), (33.77, "33.8"), (2.3171, "2.32")]
)
def test_speed(rate: float, text: str) -> None:
    assert speed(rate) == text


def test_row() -> None:
    assert [" ".join(filter(None, pair)) for pair in row(result("small", "candidate"))] == [
        "37.34 ±0.90",
        "1.0702 ±0.0018",
        "0.06688 ±0.00082",
        "80.71 ±0.20",
        "3.46 MB",
        "4.125",
        "0.41 s",
        "22818",
        "33.8",
        "447 MB",
    ]


def test_what_was_not_measured_is_a_dash() -> None:
    cells = [pair[0] for pair in row(result("base", "reference", bits_per_weight=None, cost=None))]
    assert cells == ["37.34", "–", "–", "–", "3.46 MB", "–", "–", "–", "–", "–"]


@pytest.mark.parametrize("width", [120, 108, 100, 80, 60], ids=lambda n: f"{n} columns")
def test_the_table_loses_nothing_in_a_narrower_terminal(width: int) -> None:
    names = "tiny-llama", "tiny-llama-w4g128-gptq-static-actorder"
    shown = report(result(names[0], "reference"), result(names[1], "candidate"))
    console = Console(width=width, record=True, file=Path("/dev/null").open("w", encoding="utf-8"))  # noqa: SIM115
    console.print(render(shown, width))
    console.file.close()
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for pair in row(shown.models[1]):
        for part in filter(None, pair):
            assert part in text, part


@pytest.mark.parametrize(
    ("width", "by_row"),
    [(120, True), (100, True), (80, False)],
    ids=["wide", "a hundred", "narrow"],
)
def test_rows_are_models_where_there_is_room(width: int, by_row: bool) -> None:
    from io import StringIO

    console = Console(width=width, file=StringIO())
    console.print(render(report(), width))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert any("base" in line and "37.34" in line for line in lines) == by_row


def test_footnotes_say_protocol_share_floor_and_exclusions() -> None:
    notes = "\n".join(
        footnotes(
            report(result("base", "reference"), result("sick", "candidate", excluded_tokens=7))
        )
    )
    for part in (
        "ppl/gptq-512, kl/top-512 on file:t.txt",
        "first 120 of 242 windows of 512",
        "bfloat16 on cpu",
        "base against itself in float32: KL 2.100e-04 ±0.030e-04, top-1 98.3 %",
        "sick: 7 tokens",
        "prompt of 512 and 64 new tokens, 2 threads (A CPU)",
        "352 MB of it before the model",
    ):
        assert part in notes


@pytest.mark.parametrize(
    ("protocol", "says"),
    [
        ("ppl/gptq-512", "windows of 512 tokens, bfloat16"),
        ("ppl/gptq-512-bos", "windows of 512 tokens, bfloat16"),
        ("ppl/chat-512", "windows of at most 512 tokens, bfloat16"),
        ("ppl/word-wikitext-512", "windows of at most 512 tokens, bfloat16"),
    ],
)
def test_only_windows_of_one_length_are_said_to_have_it(protocol: str, says: str) -> None:
    made = report(result("base", "reference")).model_copy(update={"protocols": [protocol]})
    assert says in footnotes(made)[0]


def test_tasks_alone_say_what_they_were_computed_in() -> None:
    made = report(result("base", "reference"))
    made = made.model_copy(update={"text": None, "passes": [], "protocols": ["task/mine"]})
    assert footnotes(made)[0] == "task/mine: bfloat16 on cpu, 2 threads; ± standard error."


def test_footnotes_name_the_kernels_by_model() -> None:
    strict = result("strict", "candidate", kernels={"cpu": 42})
    rounding = result("rounding", "candidate", kernels={"cpu_int8": 40, "reference": 2})
    notes = footnotes(report(result("base", "reference", kernels={}), strict, rounding))
    assert "Kernel of packed layers, strict: cpu." in notes
    assert "Kernel of packed layers, rounding: cpu_int8, reference." in notes
    assert not any("base: " in note for note in notes)


def test_the_first_footnote_is_a_sentence_for_one_thread_and_a_bootstrap() -> None:
    text = report().to_json().replace('"threads": 2', '"threads": 1')
    stored = json.loads(text)
    for model in stored["models"]:
        for m in model["metrics"].values():
            m["error_method"] = "block bootstrap"
    first = footnotes(Report.from_json(json.dumps(stored)))[0]
    assert "bfloat16 on cpu, 1 thread; ± standard error by block bootstrap," in first


def test_the_card_section_has_both_models_and_the_command() -> None:
    section = measured_section(report(), "small")
    lines = section.splitlines()
    assert f"| model | {' | '.join(HEADERS)} |" in lines
    assert any(line.startswith("| base (W4 g128 sym) | 37.34 ±0.90 | – |") for line in lines)
    assert any(
        line.startswith("| small (W4 g128 sym) | 37.34 ±0.90 | 1.0702 ±0.0018 |") for line in lines
    )
    assert "llmquant eval out/small --text file:t.txt" in lines
    assert "c" * 64 in section


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("", f"## Measured\n\n{START}\nNEW\n{END}\n"),
        ("# Title\n", f"# Title\n\n## Measured\n\n{START}\nNEW\n{END}\n"),
        (f"a\n{START}\nold\n{END}\nz", f"a\n{START}\nNEW\n{END}\nz"),
        (f"{START}{END}", f"{START}\nNEW\n{END}"),
    ],
    ids=["no card", "no markers", "replaced, the rest kept", "empty markers"],
)
def test_splice(card: str, expected: str) -> None:
    assert splice(card, "NEW") == expected
    assert splice(expected, "NEW") == expected


@pytest.mark.parametrize(
    "card",
    [START, END, f"{END}{START}", f"{START}{END}{START}{END}"],
    ids=["no end", "no start", "reversed", "two"],
)
def test_broken_markers_are_left_alone(card: str, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(card, encoding="utf-8")
    with pytest.raises(UsageError, match=r"README\.md: the card has \d start and \d end markers"):
        write_card(tmp_path, report(), "small")
    assert path.read_text(encoding="utf-8") == card


def test_the_card_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("# Mine\n", encoding="utf-8")
    path.chmod(0o640)
    write_card(tmp_path, report(), "small")
    once = path.read_text(encoding="utf-8")
    write_card(tmp_path, report(), "small")
    assert path.read_text(encoding="utf-8") == once
    assert once.startswith("# Mine\n\n## Measured\n\n" + START)
    assert path.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_line_ends_of_the_author_s_text_stay(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(b"\xef\xbb\xbf# Mine\r\n\r\nText.\r\n")
    write_card(tmp_path, report(), "small")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf# Mine\r\n\r\nText.\r\n")


def test_a_folder_without_a_card_gets_one(tmp_path: Path) -> None:
    assert (
        write_card(tmp_path, report(), "small")
        .read_text(encoding="utf-8")
        .startswith(f"# small\n\n## Measured\n\n{START}")
    )


def test_a_card_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "README.md").mkdir()
    with pytest.raises(LlmquantError, match=r"README\.md cannot be updated"):
        write_card(tmp_path, report(), "small")
