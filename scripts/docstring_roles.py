"""Griffe extension: docstrings name things as Sphinx does, pages show the name alone.

``:class:`~llmquant.recipe.Recipe``` becomes ```llmquant.recipe.Recipe```.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?([^`]+)`")


class Roles(Extension):
    """Takes the roles out of every docstring that is collected."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Called once for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value)
