"""Answers that leave the language of the prompt; the first two are what a real model at 4 bits
said."""

from __future__ import annotations

import pytest
from validate_kit import example, said

from llmquant_eval.validate.metrics.language import language_switch

ENGLISH = "What is the capital of France?"


@pytest.mark.parametrize(
    ("prompt", "text", "switched"),
    [
        (ENGLISH, "Bienvenido, I am your humble servant, here to help you.", 1),
        ("Name three primary colors.", "The primary colors are:\n\nRed: YEL被\nOrange: YEL被", 1),
        (ENGLISH, "The capital of France is Paris.", 0),
        (ENGLISH, "Paris.", 0),
        (ENGLISH, "", 0),
        (ENGLISH, "La capital de Francia es París.", 1),
        (ENGLISH, "Sure! `Bienvenido` and ```\nprint('también')\n```", 0),
        (ENGLISH, "It is near München, says Professor Müller.", 0),
        (ENGLISH, "Use kubectl, then numpy and json.", 0),
        ("What does 你好 mean?", "你好 means hello.", 0),
        ("What does bienvenido mean?", "Bienvenido means welcome.", 0),
        ("¿Cuál es la capital de Francia?", "La capital de Francia es París.", 0),
        ("¿Cuál es la capital de Francia?", "The most common answer is that they were Romans.", 1),
        ("Wie heißt die Hauptstadt von Frankreich?", "Die Hauptstadt heißt Paris.", 0),
        ("Wie heißt die Hauptstadt von Frankreich?", "Die Hauptstadt ist very beautiful.", 1),
        ("法国的首都是哪里？", "法国的首都是巴黎 (Paris)。", 0),
        ("法国的首都是哪里？", "The capital is Paris.", 1),
        ("Какая столица Франции?", "Столица Франции — Париж.", 0),
        ("Какая столица Франции?", "Столица Франции — 巴黎.", 1),
        ("12 + 30 = ?", "42", 0),
    ],
)
def test_switches(prompt: str, text: str, switched: float) -> None:
    assert language_switch(example(prompt=prompt), said(text)) == switched


def test_a_quotation_in_a_long_text_is_none() -> None:
    long = "The museum is in the old part of the town and it has a garden. " * 4
    assert language_switch(example(prompt=ENGLISH), said(long + "They call it jardín.")) == 0
