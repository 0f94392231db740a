"""What all commands have in common, so that none can forget it.

The word that ``--help`` shows for a value: ``--nsamples N``, ``--output PATH``, ``MODEL``. Without
one, typer shows Python's type (``<int>``, ``<list[str]>``), which says nothing to a user. A better
word is given where the option is (``metavar=``); what has none gets one by its type.

An option that names one text or one model to be read is given once: the parser would take the last
and drop the others without a word, and ``--text a --text b`` would measure half of what was meant.
Of other options the last counts, as everywhere, so that a script's can be overridden.

An empty path or text is refused: it is what a script's unset variable gives (``-o "$OUT"``), and as
a path it would be the folder that the user stands in, which ``--overwrite`` replaces.

An interruption that a command does not tell itself is told here; typer would end without a word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand
from typer.models import ArgumentInfo, OptionInfo

from llmquant.cli.stopping import tell
from llmquant.errors import UsageError

_WORDS: dict[Any, str] = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


def name_values(app: typer.Typer) -> None:
    """Give every argument and option of the app's commands a word for its value. Flags have none,
    and choices show what can be chosen."""
    for command in app.registered_commands:
        if command.callback is None:
            continue
        hints = get_type_hints(command.callback, include_extras=True)
        command.callback.__annotations__ = hints  # typer reads the same objects, not new ones
        for parameter, hint in hints.items():
            for extra in getattr(hint, "__metadata__", ()):
                if isinstance(extra, OptionInfo | ArgumentInfo) and extra.metavar is None:
                    argument = isinstance(extra, ArgumentInfo)
                    extra.metavar = parameter.upper() if argument else _word(get_args(hint)[0])


def _word(kind: Any) -> str | None:
    """The word for a type, for the type within ``list[…]`` and beside ``None``."""
    if get_origin(kind) in (list, Union) or hasattr(kind, "__args__"):
        words = (_word(inner) for inner in get_args(kind) if inner is not type(None))
        return next(words, None)
    return _WORDS.get(kind)


_READ = frozenset(
    {"text", "eval_text", "data", "heldout_data", "calibration", "reference", "suite"}
)
"""Parameters that name what is read; where a command takes several of it, they are lists."""


class CheckedCommand(TyperCommand):
    """A command whose options of one text or model are given once, and whose paths and texts are
    not empty."""

    paths: frozenset[str] = frozenset()
    """Its parameters that are paths."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        values, _, order = self.make_parser(ctx).parse_args(args=list(args))
        self._refuse_empty(values)
        given = Counter(
            max(param.opts, key=len)
            for param in order
            if param.name in _READ and not getattr(param, "multiple", False)
        )
        for name, times in given.items():
            if times > 1:
                raise UsageError(
                    f"{name} is given {_times(times)} and takes one value; give it once"
                )
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as e:
            e.message = e.message.removeprefix("Value error, ")  # pydantic's, of some typers
            raise

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as e:
            tell(e)

    def _refuse_empty(self, values: Mapping[str, Any]) -> None:
        for param in self.params:
            value = values.get(param.name or "")
            several = value if isinstance(value, list) else [value]
            if "" in several and param.name in self.paths | _READ:
                option = param.param_type_name == "option"
                name = max(param.opts, key=len) if option else param.metavar
                raise UsageError(f"{name} is empty; was a variable empty?")


def _times(count: int) -> str:
    return "twice" if count == 2 else f"{count} times"


def check_values(app: typer.Typer) -> None:
    """Make commands of that kind of all that the app has."""
    for command in app.registered_commands:
        hints = get_type_hints(command.callback, include_extras=True)
        paths = frozenset(n for n, hint in hints.items() if _word(hint) == "PATH")
        command.cls = type("CheckedCommand", (CheckedCommand,), {"paths": paths})
