"""``ppl/word`` is lm-eval's number: the same model and text through lm-eval itself, local data, no
network."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmquant_eval.run.evaluate import evaluate
from llmquant_eval.run.request import Request
from llmquant_eval.texts.wikitext import wikitext_detokenize

lm_eval = pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")
WINDOW = 128
FIGURES = ("word_perplexity", "byte_perplexity", "bits_per_byte")


def lm_eval_task(detokenized: bool, data: Path) -> dict[str, Any]:
    """lm-eval's ``wikitext`` over a local file: its own functions, once with its detokenizer and
    once without."""
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

    return {
        "task": "local_wikitext",
        "dataset_path": "json",
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "doc_to_text": "",
        "doc_to_target": wikitext_detokenizer if detokenized else "{{page}}",
        "process_results": process_results,
        "metric_list": [{"metric": name} for name in FIGURES],
    }


@pytest.fixture(scope="module")
def pages(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three documents of held-out text, one shorter than a window, one of exotic bytes and
    WikiText's own spacing."""
    text = (tiny_llama / "heldout.txt").read_text(encoding="utf-8")
    spaced = ' = Ahoj světe = \n It \'s 1 @,@ 000 @.@ 5 well @-@ known ( so @-@ called ) " quotes " , said N men . ° '
    path = tmp_path_factory.mktemp("pages") / "pages.jsonl"
    pages = [text[:3000], "A short page .", spaced * 3 + text[5000:6200]]
    path.write_text("".join(json.dumps({"page": page}) + "\n" for page in pages), encoding="utf-8")
    return path


def by_lm_eval(model: Path, data: Path, detokenized: bool) -> dict[str, float]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapter = HFLM(
        pretrained=loaded,
        tokenizer=AutoTokenizer.from_pretrained(model),
        max_length=WINDOW,
        batch_size=1,
    )
    found = simple_evaluate(
        adapter,
        tasks=[lm_eval_task(detokenized, data)],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    assert found is not None
    return {name: found["results"]["local_wikitext"][f"{name},none"] for name in FIGURES}


@pytest.mark.filterwarnings("ignore")  # lm-eval's and datasets' own
@pytest.mark.parametrize("detokenized", [False, True], ids=["plain", "wikitext detokenizer"])
def test_word_figures_equal_lm_eval_s(detokenized: bool, tiny_llama: Path, pages: Path) -> None:
    expected = by_lm_eval(tiny_llama, pages, detokenized)
    protocol = f"ppl/word{'-wikitext' if detokenized else ''}-{WINDOW}"
    request = Request(
        (str(tiny_llama),), f"jsonl:{pages}#page", protocol=protocol, dtype="float32", cost=False
    )
    metrics = evaluate(request).models[0].metrics
    assert {m.protocol for m in metrics.values()} == {protocol}
    assert {name: metrics[name].value for name in FIGURES} == pytest.approx(expected, rel=2e-6)


def test_the_detokenizer_changes_what_is_scored_but_not_what_is_counted(
    tiny_llama: Path, pages: Path
) -> None:
    request = Request(
        (str(tiny_llama),),
        f"jsonl:{pages}#page",
        protocol="ppl/word,ppl/word-wikitext",
        window=WINDOW,
        dtype="float32",
        cost=False,
    )
    report = evaluate(request)
    metrics = report.models[0].metrics
    assert report.protocols == ["ppl/word-128", "ppl/word-wikitext-128"]
    plain, other = metrics["word_perplexity"], metrics["word_perplexity@ppl/word-wikitext-128"]
    assert plain.tokens > other.tokens  # "1 @,@ 000" is more tokens than "1,000"
    assert plain.value != pytest.approx(other.value, rel=0.01)
    total = math.log(plain.value) / math.log(metrics["byte_perplexity"].value)
    assert total == pytest.approx(
        math.log(other.value) / math.log(metrics["byte_perplexity@ppl/word-wikitext-128"].value)
    )


@pytest.mark.filterwarnings("ignore")
@given(st.text(alphabet="a N's =@-,.!?:;()[]{}\"'\n°1/", max_size=60))
def test_the_detokenizer_is_lm_eval_s(text: str) -> None:
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    assert wikitext_detokenize(text) == wikitext_detokenizer({"page": text})
