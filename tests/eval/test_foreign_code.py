"""No code comes from a model folder: it is not run, nobody is asked whether it should be, and
``--json`` keeps stdout for the Report."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import yaml
from children import Ended, make_foreign, run_commands

import llmquant
from llmquant.errors import ArchitectureError, CheckpointError, LlmquantError, UsageError
from llmquant_eval.run.evaluate import evaluate
from llmquant_eval.run.request import Request

KINDS = ("text", "text as JSON", "reference", "tasks", "suite")


@pytest.fixture(scope="module")
def foreign(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(base_model, tmp_path_factory.mktemp("foreign") / "model")
    return make_foreign(Path(folder))


def commands(foreign: Path, base: Path) -> list[list[str]]:
    """One of each of :data:`KINDS`."""
    words, items, suite = (foreign.parent / n for n in ("words.txt", "items.jsonl", "suite.yaml"))
    words.write_text("w3 w4 w5 w6 w7 w8", encoding="utf-8")
    items.write_text(
        '{"question": "w3 w4", "choices": [" w5", " w6 w7"], "answer": 0}\n', encoding="utf-8"
    )
    suite.write_text(
        yaml.safe_dump(
            {
                "models": [{"label": "foreign", "model": str(foreign)}],
                "texts": [{"name": "words", "source": f"file:{words}"}],
                "protocols": ["ppl/gptq-4"],
                "cost": False,
            }
        ),
        encoding="utf-8",
    )
    text = ["--text", f"file:{words}", "--window", "4", "--no-cost"]
    return [
        ["eval", str(foreign), *text],
        ["eval", str(foreign), *text, "--json"],
        ["eval", str(base), "--reference", str(foreign), *text, "--json"],
        ["eval", str(foreign), "--tasks", f"choice_local={items}", "--no-cost", "--json"],
        ["eval", "--suite", str(suite), "--cache", str(foreign.parent / "cache")],
    ]


@pytest.fixture(scope="module", params=["stdin closed", "at a terminal"])
def ended(request: pytest.FixtureRequest, foreign: Path, base_model: Path) -> dict[str, Ended]:
    """What each command ended with, by its kind."""
    done = run_commands(commands(foreign, base_model), at_terminal=request.param == "at a terminal")
    return dict(zip(KINDS, done, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_foreign_code_is_an_error_and_not_a_question(
    kind: str, ended: dict[str, Ended], foreign: Path
) -> None:
    code, out, err = ended[kind]
    assert code in (1, 2), err
    assert out == ""
    assert "Traceback" not in err
    assert "[y/N]" not in err
    assert str(foreign) in err
    assert "never runs code from a model folder" in err
    assert not (foreign / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        pytest.param("config.json", '{"model_type": "llama", "hidden_size": "x"}',
                     ArchitectureError, id="config of nonsense"),
        pytest.param("config.json", "{", LlmquantError, id="config of no JSON"),
        pytest.param("tokenizer.json", "{}", CheckpointError, id="tokenizer of nothing"),
        pytest.param("tokenizer.json", '{"model": {"type": "none"}}', CheckpointError,
                     id="tokenizer of another kind"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_the_library_s_own_error(
    name: str,
    content: str,
    error: type[LlmquantError],
    base_model: Path,
    words: Path,
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(base_model, tmp_path / "model"))
    (folder / name).write_text(content, encoding="utf-8")
    read = llmquant.read_config if name == "config.json" else llmquant.load_tokenizer
    with pytest.raises(error):
        read(folder)
    with pytest.raises(error):
        evaluate(Request((str(folder),), str(words), window=64, cost=False))


def test_a_task_that_runs_generated_programs_is_refused(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    data = tmp_path / "items.jsonl"
    data.write_text('{"question": "w3", "answer": "w4"}\n', encoding="utf-8")
    (tmp_path / "programs.yaml").write_text(
        "task: programs\ndataset_path: json\noutput_type: generate_until\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: '{data}'}}}}\nunsafe_code: true\n"
        "doc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n",
        encoding="utf-8",
    )
    request = Request((str(base_model),), tasks="programs", include_path=str(tmp_path), cost=False)
    with pytest.raises(UsageError, match="programs runs the programs that a model writes"):
        evaluate(request)
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"
