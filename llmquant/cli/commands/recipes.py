"""``llmquant recipes``: the recipes that come with llmquant, or one of them as YAML."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from llmquant.cli.screen import fact_table, screen


def recipes_command(
    name: Annotated[str | None, typer.Argument(help="Print this recipe as YAML.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the shipped recipes, or show one."""
    from llmquant.recipe import load_recipe, shipped

    if name is not None:
        recipe = load_recipe(name)
        sys.stdout.write(
            json.dumps(recipe.model_dump(mode="json")) + "\n" if as_json else recipe.to_yaml()
        )
        return
    descriptions = {n: load_recipe(n).description for n in shipped()}
    if as_json:
        sys.stdout.write(json.dumps(descriptions) + "\n")
        return
    screen().print(fact_table(descriptions.items()))
