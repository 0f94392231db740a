"""``llmquant recipes``: the recipes that come with llmquant and what they cost models of each size,
or one of them as YAML."""

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
    """List the shipped recipes with their cost, or show one."""
    from llmquant.recipe import load_recipe, shipped

    if name is not None:
        recipe = load_recipe(name)
        sys.stdout.write(
            json.dumps(recipe.model_dump(mode="json")) + "\n" if as_json else recipe.to_yaml()
        )
        return
    from llmquant.cli.costs import class_lines, cost_line, costs_as_dict
    from llmquant.planning.costs import size_classes

    descriptions = {n: load_recipe(n).description for n in shipped()}
    classes = size_classes()
    if as_json:
        listed = {
            n: {"description": text, "costs": costs_as_dict(n, classes)}
            for n, text in descriptions.items()
        }
        sys.stdout.write(json.dumps(listed) + "\n")
        return
    rows = []
    for recipe_name, description in descriptions.items():
        rows += [(recipe_name, description), ("", cost_line(recipe_name, classes))]
    console = screen()
    console.print(fact_table(rows))
    console.print("\nKL is the mean in nats. Sizes of models and what was measured:\n")
    console.print(fact_table(class_lines(classes)))
