"""The models of one evaluation as they are loaded and let go."""

from __future__ import annotations

from typing import Any

from llmquant_eval.models.resolve import ModelFolder, kernels_used, load_model
from llmquant_eval.run.plan import EvaluationPlan


class LoadedModels:
    """Each is loaded when it is first asked for.

    Args:
        plan: says the dtype and the device.
        kernel: for packed linears.

    Attributes:
        kernels: of a model's packed linears, by its label: how many use each.
    """

    def __init__(self, plan: EvaluationPlan, kernel: str) -> None:
        self._plan, self._kernel = plan, kernel
        self._models: dict[str, Any] = {}
        self.kernels: dict[str, dict[str, int]] = {}

    def get(self, model: ModelFolder) -> Any:
        if model.label not in self._models:
            loaded = load_model(model.path, self._plan.dtype, self._plan.device, self._kernel)
            self._models[model.label] = loaded
            self.kernels[model.label] = kernels_used(loaded)
        return self._models[model.label]

    def let_go(self, model: ModelFolder) -> None:
        self._models.pop(model.label, None)
