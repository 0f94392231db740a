"""``python notebook.py FILE``: run a notebook's code cells in one namespace, without jupyter."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def code_cells(path: Path) -> list[str]:
    """Sources of the code cells, in order."""
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


if __name__ == "__main__":
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(code_cells(Path(sys.argv[1]))):
        exec(compile(source, f"cell {number}", "exec"), namespace)
