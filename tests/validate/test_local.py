"""A model that generates here gives what slow and obvious loops give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import long_rope
from transformers import AutoModelForCausalLM, AutoTokenizer
from validate_kit import example

from llmquant.errors import QuantizationError, UsageError
from llmquant_eval.models.resolve import ModelFolder
from llmquant_eval.validate.answers import Task
from llmquant_eval.validate.engines.engine import Generation, TaskError
from llmquant_eval.validate.engines.local import LocalEngine

NEW = 12
PROMPTS = ("Hello", "What is the name of the river that flows there?", "One two", "And then?")
TEXTS = ("yes", "a much longer answer than the other", " no")


def engine_of(folder: Path, together: int = 4, **options: Any) -> LocalEngine:
    generation = Generation(max_tokens=NEW, **options)
    where = ("float32", "cpu", "auto")
    return LocalEngine(ModelFolder(str(folder), folder, "small"), generation, where, together)


def tasks(*prompts: str, texts: tuple[str, ...] = ()) -> list[Task]:
    return [Task(example(prompt=p), True, texts) for p in prompts]


@pytest.fixture(scope="module")
def twin(model: Path) -> tuple[Any, Any]:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return loaded, AutoTokenizer.from_pretrained(model)


def prompt_ids(tokenizer: Any, prompt: str, raw: bool) -> list[int]:
    if raw:
        return list(tokenizer(prompt)["input_ids"])
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def greedy(model: Any, ids: list[int], ends: set[int]) -> list[int]:
    """One token at a time, without a cache."""
    new: list[int] = []
    while len(new) < NEW and not (new and new[-1] in ends):
        with torch.no_grad():
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new


@pytest.mark.parametrize("raw", [False, True], ids=["chat", "raw"])
@pytest.mark.parametrize("together", [1, 4], ids=["alone", "together"])
def test_answers_are_those_of_a_loop(model: Path, twin: Any, raw: bool, together: int) -> None:
    loaded, tokenizer = twin
    engine = engine_of(model, together, raw=raw)
    asked = tasks(*PROMPTS)
    units = [asked[i : i + together] for i in range(0, len(asked), together)]
    got = [m.answer for _, measured in engine.measure(units) for m in measured]
    for prompt, answer in zip(PROMPTS, got, strict=True):
        new = greedy(loaded, prompt_ids(tokenizer, prompt, raw), {1})
        ended = new[-1] == 1
        assert answer is not None
        assert answer.text == tokenizer.decode(
            new[: -1 if ended else None], skip_special_tokens=True
        )
        assert (answer.tokens, answer.ended) == (len(new), ended)


def test_a_long_prompt_does_not_turn_the_positions_of_its_neighbours(
    model: Path, tmp_path: Path
) -> None:
    """ "longrope": a pass of more tokens than the model was first trained on has other
    frequencies, for the short sequences in it too."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    turned: Any = long_rope(30, len(tokenizer))
    turned.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompts = ("Hello", "the name of the river " * 8, "One two")
    asked = tasks(*prompts, texts=("yes", "no " * 30))
    ((_, measured),) = engine_of(tmp_path, raw=True).measure([asked])
    engine = engine_of(tmp_path, raw=True)
    for prompt, task, found in zip(prompts, asked, measured, strict=True):
        ids = prompt_ids(tokenizer, prompt, raw=True)
        told = tokenizer.decode(greedy(turned, ids, engine._ends), skip_special_tokens=True)
        assert found.answer is not None
        assert found.answer.text == told
        for (n, whole), scored in zip(engine._prompts.pairs(task), found.scored, strict=True):
            log_p = turned(torch.tensor([whole])).logits[0, n - 1 : -1].log_softmax(-1)
            alone = log_p.gather(1, torch.tensor(whole[n:])[:, None]).sum().item()
            assert scored.logprob == pytest.approx(alone, abs=1e-4)


def test_the_end_of_a_turn_is_seen_and_not_in_the_text(model: Path, twin: Any) -> None:
    """The token that comes fourth is made an end of the turn."""
    loaded, tokenizer = twin
    new = greedy(loaded, prompt_ids(tokenizer, PROMPTS[0], False), set())
    place = next(i for i in range(2, NEW) if new[i] not in new[:i])
    engine = engine_of(model)
    engine._ends |= {new[place]}
    ((_, (first, second)),) = engine.measure([tasks(*PROMPTS[:2])])
    assert first.answer is not None
    assert (first.answer.tokens, first.answer.ended) == (place + 1, True)
    assert first.answer.text == tokenizer.decode(new[:place], skip_special_tokens=True)
    assert second.answer is not None
    assert not second.answer.ended


@pytest.mark.parametrize("raw", [False, True], ids=["chat", "raw"])
def test_log_probabilities_are_those_of_single_passes(model: Path, twin: Any, raw: bool) -> None:
    loaded, tokenizer = twin
    (task,) = tasks(PROMPTS[1], texts=TEXTS)
    ((_, (measured,)),) = engine_of(model, raw=raw).measure([[task]])
    before = prompt_ids(tokenizer, PROMPTS[1], raw)
    for text, scored in zip(TEXTS, measured.scored, strict=True):
        spaced = text if not raw or text.startswith(" ") else f" {text}"
        ids = before + tokenizer(spaced, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            log_p = loaded(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        single = sum(float(log_p[i - 1, ids[i]]) for i in range(len(before), len(ids)))
        assert scored.tokens == len(ids) - len(before)
        assert scored.logprob == pytest.approx(single, abs=1e-3)


def test_drawing_repeats_by_seed(model: Path) -> None:
    def drawn(seed: int) -> list[str]:
        engine = engine_of(model, temperature=1.0, seed=seed)
        return [
            m.answer.text for _, ms in engine.measure([tasks(*PROMPTS)]) for m in ms if m.answer
        ]

    assert drawn(1) == drawn(1) != drawn(2)


def test_settings_of_the_folder_do_not_change_greedy_answers(
    model: Path, tmp_path: Path, twin: Any
) -> None:
    import shutil

    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    (copy / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 5.0, "repetition_penalty": 9.0, "eos_token_id": 1}'
    )
    one, other = (
        [m.answer for _, ms in engine_of(f).measure([tasks(*PROMPTS)]) for m in ms]
        for f in (model, copy)
    )
    assert one == other


def test_a_model_of_nan_is_an_error_and_no_answer(model: Path) -> None:
    engine = engine_of(model)
    with torch.no_grad():
        engine._model.get_output_embeddings().weight[7] = torch.nan
    for task in (Task(example(), True, ()), Task(example(), False, ("yes",))):
        with pytest.raises(TaskError) as failed:
            list(engine.measure([[task]]))
        assert failed.value.task is task
        assert isinstance(failed.value.why, QuantizationError)


@pytest.mark.parametrize(
    ("row", "options", "says"),
    [
        pytest.param({"prompt": "word " * 130}, {}, "do not fit into the model's 128", id="long"),
        pytest.param({"prompt": "word " * 90}, {}, None, id="fits"),
        pytest.param(
            {"prompt": "a", "system": "b"}, {"raw": True}, "--raw is given", id="system and raw"
        ),
    ],
)
def test_what_cannot_be_asked_is_refused_before_weights_are_read(
    model: Path, row: dict[str, Any], options: dict[str, Any], says: str | None
) -> None:
    task = Task(example(**row), True, ())
    engine = engine_of(model, **options)
    if says is None:
        assert engine.check([task], lambda _: "line 7") == []
        return
    with pytest.raises(UsageError, match=f"line 7: .*{says}"):
        engine.check([task], lambda _: "line 7")


@pytest.mark.parametrize("raw", [False, True], ids=["chat", "raw"])
def test_a_text_of_no_tokens_is_not_scored(model: Path, raw: bool) -> None:
    """Its log-probability of 0 would be the best of all choices."""
    engine, task = engine_of(model, raw=raw), tasks("a ", texts=("b", ""))[0]
    with pytest.raises(UsageError, match=r"line 7: the tokenizer makes no token of .* choice ''"):
        engine.check([task], lambda _: "line 7")


def test_a_model_without_a_template_continues_text_and_takes_no_conversation(
    base_folder: Path,
) -> None:
    engine = engine_of(base_folder)
    engine.check([Task(example(prompt="w3 w4"), True, ())], lambda _: "line 7")
    talk = example(prompt=None, messages=[{"role": "system", "content": "x"}] * 2)
    with pytest.raises(UsageError, match="has no chat template"):
        engine.check([Task(talk, True, ())], lambda _: "line 7")


def test_what_the_template_leaves_out_is_said(model: Path) -> None:
    tool = {"type": "function", "function": {"name": "rare_name", "parameters": {}}}
    task = Task(example(tools=[tool]), True, ())
    assert engine_of(model).check([task], lambda _: "") == [
        "chats whose tools the chat template leaves out: 1"
    ]


def test_special_tokens_are_left_out_but_for_those_of_thinking(model: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(model, tmp_path / "thinking"))
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<think>", "</think>", "<other>"]})
    tokenizer.save_pretrained(copy)
    text = "<think>so</think> yes<other>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = engine_of(copy)._answer(ids, opened=False)
    assert (answer.text, answer.marked, answer.final) == ("<think>so</think> yes", text, "yes")
