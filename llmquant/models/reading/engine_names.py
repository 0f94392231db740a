"""What engines call a checkpoint's modules, said in the config of a packed folder.

A config that gives every linear one scheme needs no names but those of what is left alone. Both
kinds of name are the checkpoint's, and engines look for their own: transformers renames modules
that its table of conversions names, and whatever runs a model that also sees puts the text part
into a place of its own. So the config has further names, or regular expressions for them; without
these an engine would fill the place of a packed linear with random numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmquant.errors import LayoutError
from llmquant.formats.base import Format, Scheme
from llmquant.models.architectures import ARCHITECTURES, Architecture
from llmquant.models.from_folder import read_config
from llmquant.models.naming.conversions import in_memory, moved_modules
from llmquant.models.naming.whole import linears_beside
from llmquant.models.reading.fit import Fitted
from llmquant.models.reading.tower import Tower
from llmquant.models.unreached import unreached


@dataclass(frozen=True, slots=True)
class EngineNames:
    """Names of a checkpoint's modules.

    Attributes:
        architecture: its row of the table, if it has one.
        tower: where it keeps the text part, if it is more than that.
        elsewhere: modules outside the text part, by the checkpoint's names and by transformers'.
        moved: modules that transformers' own table of conversions moves: its name → the file's.
    """

    architecture: Architecture | None
    tower: Tower | None
    elsewhere: tuple[str, ...]
    moved: Mapping[str, str] = field(default_factory=dict)

    def config(
        self, layout: Format, schemes: Mapping[str, Scheme], skipped: Mapping[str, str]
    ) -> dict[str, Any]:
        """The layout's ``quantization_config``, which engines understand under their names.

        Raises:
            LayoutError: it says by exact names alone which linear has which scheme.
        """
        tower = self.tower
        ignored = list(skipped)
        if self.architecture is not None:
            ignored += self.architecture.in_memory(skipped)
        ignored += in_memory(skipped, self.moved)
        if tower is not None:
            text = [n for n in skipped if n not in self.elsewhere]
            ignored += _also(tower, text)
            ignored += tower.patterns(self.elsewhere)
        config = layout.config(schemes, list(dict.fromkeys(ignored)))
        if tower is None:
            return config
        if any(key.startswith("+:") for key in config.get("dynamic", ())):
            raise LayoutError(
                f"format {layout.name} says by the checkpoint's names which linears have another scheme, and engines call those "
                "of a model that also sees otherwise; write it as compressed-tensors"
            )
        groups: dict[str, Any] = config.get("config_groups", {})
        named = {
            key: {**group, "targets": _also(tower, group["targets"])}
            for key, group in groups.items()
        }
        return {**config, "config_groups": named} if named else config


def _also(tower: Tower, targets: list[str]) -> list[str]:
    """Targets, and engines' names of those that are modules of the text part: patterns, and what
    the text model alone calls them."""
    patterns = [pattern for t in targets if (pattern := tower.pattern(t)) is not None]
    alone = [name for t in targets if (name := tower.alone(t)) is not None]
    return list(dict.fromkeys((*targets, *alone, *patterns)))


def engine_names(fit: Fitted) -> EngineNames:
    """The names of a folder's modules."""
    tower = fit.tower
    kind = tower.kind if tower else str(fit.reader.config.get("model_type"))
    row = ARCHITECTURES.get(kind)
    # Modules of blocks that text passes by lie among the text part's own and are named one by one.
    passed = tuple(f"{n}." for n in unreached(fit.model))
    elsewhere = [n.rpartition(".")[0] for n in fit.outside if not n.startswith(passed)]
    if elsewhere:
        elsewhere += linears_beside(read_config(fit.reader.path))
    return EngineNames(
        tower.placed(row) if tower and row else row,
        tower,
        tuple(dict.fromkeys(elsewhere)),
        moved_modules(fit.model),
    )
