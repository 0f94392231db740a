"""What both commands do with their options: check for the extra's packages, load, serve."""

from __future__ import annotations

from contextlib import ExitStack, closing
from importlib.util import find_spec
from typing import TYPE_CHECKING

from llmquant.errors import LlmquantError

if TYPE_CHECKING:
    from llmquant_serve.chat.opening import Opening
    from llmquant_serve.drift.options import DriftOptions
    from llmquant_serve.engines.options import ModelOptions
    from llmquant_serve.server import Binding
    from llmquant_serve.service import Limits


def require(*modules: str) -> None:
    """Check that the packages of the ``serve`` extra can be imported.

    Raises:
        LlmquantError: some are missing.
    """
    missing = [m for m in modules if find_spec(m) is None]
    if missing:
        raise LlmquantError(
            f"{', '.join(missing)} not found; install what serving needs with "
            "pip install 'llmquant[serve]'"
        )


def launch(
    served: ModelOptions,
    limits: Limits,
    binding: Binding,
    reference: str | None,
    drift: DriftOptions | None = None,
    opening: Opening | None = None,
) -> None:
    """Serve a model until a signal comes.

    Args:
        reference: the original model, for the chat page and to score samples.
        drift: what is to be done about it.
        opening: what the settings of the chat page are at first.
    """
    import llmquant
    from llmquant_serve.build import build_service, watch_drift
    from llmquant_serve.engines.options import ModelOptions
    from llmquant_serve.server import bound_socket, run
    from llmquant_serve.service import Limits

    # The socket comes before the model: a port that is taken should not cost the time of loading.
    with bound_socket(binding) as listening, ExitStack() as opened:
        log = None if drift is None else opened.enter_context(closing(drift.opened()))
        original = folder = None
        if reference is not None:
            compared = ModelOptions(
                model=reference, dtype=served.dtype, device=served.device, context=served.context,
                threads=served.threads,
            )  # fmt: skip
            original = build_service(compared, Limits(max_streams=2))
            folder = llmquant.resolve(reference)
        service = build_service(served, limits)
        if drift is not None and log is not None:
            watch_drift(service, drift, log, original)
        run(service, binding, listening, original, llmquant.resolve(served.model), folder, opening)
