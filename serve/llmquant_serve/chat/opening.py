"""Opening: what the settings of the chat page are before a visitor changes them."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmquant_serve.engines.base import Sampling


@dataclass(frozen=True, slots=True)
class Opening:
    """A system prompt and how tokens are chosen."""

    system: str = ""
    sampling: Sampling = field(
        default_factory=lambda: Sampling(max_tokens=512, temperature=0.7, top_p=0.95)
    )
