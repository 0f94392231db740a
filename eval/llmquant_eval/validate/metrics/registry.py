"""All metrics, and which of them a run has."""

from __future__ import annotations

from collections.abc import Sequence

from llmquant.errors import UsageError
from llmquant_eval.validate.examples import Example
from llmquant_eval.validate.metrics import behaviour, right, structure
from llmquant_eval.validate.metrics.language import language_switch
from llmquant_eval.validate.metrics.metric import Metric


def _all(_: Example) -> bool:
    return True


METRICS: Sequence[Metric] = (
    Metric("exact_match", lambda e: bool(e.answers), right.exact_match),
    Metric("contains_answer", lambda e: bool(e.answers), right.contains_answer),
    Metric("regex", lambda e: bool(e.patterns), right.matches),
    Metric("choice_accuracy", lambda e: bool(e.choices), right.choice_accuracy, generates=False),
    Metric("answer_logprob", lambda e: bool(given(e)), right.answer_logprob, generates=False),
    Metric("json_valid", lambda e: e.json_answer, structure.json_valid),
    Metric("schema_valid", lambda e: e.validator is not None, structure.schema_valid),
    Metric("tool_call", lambda e: bool(e.calls), structure.tool_call),
    Metric("tool_call_valid", lambda e: bool(e.calls or e.tools), structure.tool_call_valid),
    Metric("end_of_turn", _all, behaviour.end_of_turn),
    Metric("think_closed", _all, behaviour.think_closed),
    Metric("answer_tokens", _all, behaviour.answer_tokens, lower=True, lengthwise=True),
    Metric("repetition", _all, behaviour.repetition, lower=True),
    Metric("loop", _all, behaviour.loop, lower=True),
    Metric("language_switch", _all, language_switch, lower=True),
    Metric("refusal", lambda e: not e.refuse, behaviour.refusal, lower=True),
    Metric("refused", lambda e: e.refuse, behaviour.refusal),
)
NAMES = tuple(metric.name for metric in METRICS)


def given(example: Example) -> tuple[str, ...]:
    """Texts that the data gives as answers to the prompt; those of choices are not among them."""
    if example.choices:
        return ()
    return example.answers or ((example.said,) if example.said else ())


def chosen(names: Sequence[str], *, thinks: bool) -> list[Metric]:
    """Those that were asked for, or all; ``think_closed`` only where the model thinks, or it was
    asked for.

    Raises:
        UsageError: one that does not exist.
    """
    for name in names:
        if name not in NAMES:
            raise UsageError(f"--metric {name} does not exist; there are: {', '.join(NAMES)}")
    wanted = names or [n for n in NAMES if thinks or n != "think_closed"]
    return [metric for metric in METRICS if metric.name in wanted]


def continuations(example: Example, metrics: Sequence[Metric]) -> tuple[str, ...]:
    """The texts whose log-probability these metrics need."""
    names = {m.name for m in metrics if not m.generates and m.applies(example)}
    if "choice_accuracy" in names:
        return example.choices
    return given(example) if "answer_logprob" in names else ()
