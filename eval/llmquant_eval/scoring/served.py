"""Scoring a served model on the windows of a pass: its losses come from the server, everything
after is the same code."""

from __future__ import annotations

import numpy as np

from llmquant_eval.models.endpoint import Endpoint
from llmquant_eval.scoring.perplexity import Perplexity, check_finite
from llmquant_eval.scoring.score import Advance, Scores
from llmquant_eval.scoring.stream import Stream


def score_served(
    endpoint: Endpoint, stream: Stream, label: str, advance: Advance | None = None
) -> Scores:
    """Losses of a served model; no divergence, since a server does not give whole distributions.

    Raises:
        LlmquantError: the server fails or gives no log-probabilities of a prompt.
        QuantizationError: a loss is infinite.
    """
    layout = stream.layout
    losses = np.empty(layout.tokens)
    prompts = [stream.ids[w.begin : w.end].tolist() for w in stream.windows]
    parts = zip(stream.windows, layout.slices(), endpoint.score_all(prompts), strict=True)
    for number, (window, where, scores) in enumerate(parts):
        losses[where] = -np.array(scores.logprobs[-window.predictions :])
        check_finite(losses[where], label, [number])
        if advance is not None:
            advance(number + 1, len(stream.windows))
    return Scores(Perplexity(losses, layout, label))
