"""What can be wrong with a prompt. The layers above turn it into their own answer: a 400 of the
API, a line in the terminal, a notice on the chat page."""

from __future__ import annotations

from llmquant.errors import UsageError


class TextError(UsageError):
    """Text, chat turns or token ids that this model cannot be given.

    Args:
        parameter: what holds them, as a client of the API names it: ``prompt``,
            ``messages.0.content``.
    """

    def __init__(self, message: str, parameter: str) -> None:
        super().__init__(message)
        self.parameter = parameter
