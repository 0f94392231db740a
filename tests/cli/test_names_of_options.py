"""Names of options are those that the documents have, whatever version of typer makes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin

import pytest
from typer.models import OptionInfo

from llmquant.cli import _add_commands, app

_add_commands()
COMMANDS = [c.callback for c in app.registered_commands if c.callback is not None]


def named_by_its_value(parameter: str, option: OptionInfo) -> bool:
    """typer before 0.28 names an option that has no name of its own as its metavar is written where
    the two differ in case only: ``--RECIPE RECIPE``."""
    said = [str(d) for d in (option.default, *(option.param_decls or ()))]
    if any(d.startswith("-") for d in said) or option.metavar is None:
        return False
    return option.metavar.lower().replace("_", "-") == parameter.replace("_", "-")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.__name__)
def test_an_option_that_is_called_as_its_value_says_its_name(command: Callable[..., Any]) -> None:
    hints = inspect.get_annotations(command, eval_str=True)
    found = {
        name
        for name, hint in hints.items()
        if get_origin(hint) is Annotated
        for said in get_args(hint)[1:]
        if isinstance(said, OptionInfo) and named_by_its_value(name, said)
    }
    assert not found


def test_all_commands_are_looked_at() -> None:
    names = {c.__name__ for c in COMMANDS}
    assert {"quantize_command", "qat_command", "eval_command", "serve_command"} <= names, names


# Where and how a run happens, what it writes beside the weights and what it says.
OF_A_RUN = {
    *("output", "eval_text", "base_model", "max_shard_size", "max_memory", "resume", "restart"),
    *("log", "overwrite", "quiet"),
}


def test_a_plan_takes_every_option_that_changes_what_is_made() -> None:
    known = {c.__name__: set(inspect.signature(c).parameters) for c in COMMANDS}
    assert known["quantize_command"] - known["plan_command"] == OF_A_RUN
