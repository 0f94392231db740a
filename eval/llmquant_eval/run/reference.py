"""The reference's answers on disk, with ``--cache``: opened where they exist, else recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llmquant_eval.models.resolve import ModelFolder, vocabulary_size
from llmquant_eval.run.loaded import LoadedModels
from llmquant_eval.run.plan import EvaluationPlan
from llmquant_eval.run.request import Request
from llmquant_eval.scoring.reference_cache import (
    INDEX,
    CachedReference,
    CacheKey,
    CacheWriter,
    choose_form,
)
from llmquant_eval.scoring.score_models import Advance, record_reference
from llmquant_eval.scoring.token_stream import TokenStream


def references(
    request: Request,
    plan: EvaluationPlan,
    loaded: LoadedModels,
    advance: Callable[[str], Advance],
) -> list[CachedReference | None]:
    """One per stream, None each without ``--cache``. The reference is let go afterwards.

    Args:
        advance: of the name of a stage.
    """
    reference, caches = plan.reference, list[CachedReference | None]()
    if request.cache is None or reference is None:
        return [None] * len(plan.streams)
    for stream in plan.streams:
        key = _key(request, plan, reference, stream)
        place = Path(request.cache) / key.name
        if not (place / INDEX).is_file():
            model = loaded.get(reference)
            writer = CacheWriter(place, key, stream, vocabulary_size(reference.path))
            shown = advance(f"reference for {stream.protocol.perplexity_id}")
            record_reference(model, stream, writer, request.batch_size, shown, reference.label)
            writer.finish(loaded.kernels[reference.label])
        cached = CachedReference(place)
        caches.append(cached)
        loaded.kernels[reference.label] = cached.kernels
    loaded.let_go(reference)
    return caches


def _key(
    request: Request, plan: EvaluationPlan, reference: ModelFolder, stream: TokenStream
) -> CacheKey:
    form = choose_form(request.cache_form, stream.layout.tokens, vocabulary_size(reference.path))
    return CacheKey(
        weights_sha256=plan.inspections[reference.label].weights_sha256,
        tokenizer_sha256=plan.tokenizers_sha256[reference.label],
        ids_sha256=stream.sha256(),
        protocol=stream.protocol.perplexity_id,
        dtype=plan.dtype,
        device=plan.device,
        kernel=request.kernel,
        form=form.name,
    )
