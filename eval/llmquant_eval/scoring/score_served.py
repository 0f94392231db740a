"""Scoring a served model on the windows of a pass: its losses come from the server, everything
after is the same code."""

from __future__ import annotations

import numpy as np

from llmquant_eval.models.endpoint import Endpoint
from llmquant_eval.scoring.perplexity import Perplexity, check_finite
from llmquant_eval.scoring.score_models import Advance, Scores
from llmquant_eval.scoring.token_stream import TokenStream


def prompts_of(stream: TokenStream) -> list[list[int]]:
    """The windows as prompts: what is scored last is part of one, since a prompt is scored."""
    return [stream.ids[w.begin : w.end].tolist() for w in stream.windows]


def score_served(
    endpoint: Endpoint, stream: TokenStream, label: str, advance: Advance | None = None
) -> Scores:
    """Losses of a served model; no divergence, since a server does not give whole distributions.

    Raises:
        LlmquantError: the server fails or gives no log-probabilities of a prompt.
        QuantizationError: a loss is infinite.
    """
    layout = stream.layout
    losses = np.empty(layout.tokens)
    answers = endpoint.score_all(prompts_of(stream))
    parts = zip(stream.windows, layout.slices(), answers, strict=True)
    for number, (window, where, scores) in enumerate(parts):
        losses[where] = -np.array(scores.logprobs[-window.predictions :])
        check_finite(losses[where], label, [number])
        if advance is not None:
            advance(number + 1, len(stream.windows))
    return Scores(Perplexity(losses, layout, label))
