"""A request, and the plan made of it: all that can be looked up or refused before a weight is read.

``Request`` is the command line as a value and can write itself back as one, so a Report carries the
line that repeats it. ``EvaluationPlan`` holds the token streams, one per protocol, and the models'
paths: every model must cut the text into the same tokens and take windows of that length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import llmquant
from llmquant.errors import UsageError
from llmquant_eval.models.endpoint import Contact, tell_nobody
from llmquant_eval.models.resolve import (
    AnyModel,
    ModelFolder,
    ServedModel,
    max_positions,
    resolve_models,
    vocabulary_size,
)
from llmquant_eval.report.schema import TextRows
from llmquant_eval.run.request import Request
from llmquant_eval.scoring.protocols import (
    WindowProtocol,
    default_window,
    parse_protocol,
)
from llmquant_eval.scoring.token_stream import TokenStream, make_stream
from llmquant_eval.texts.tokens import check_same_tokens, tokenizer_sha256

if TYPE_CHECKING:
    import torch

    from llmquant import ChosenDtype, Computing, Documents, Inspection
    from llmquant_eval.tasks.harness import TaskPlan


@dataclass(frozen=True, eq=False)
class EvaluationPlan:
    """What a request means. ``streams`` has one per protocol, none without a text; ``tasks`` None
    without tasks."""

    models: tuple[AnyModel, ...]
    reference: ModelFolder | None
    tokenizers: dict[str, Any]
    text_source: str | None
    text_sha256: str | None
    text_rows: TextRows | None
    streams: tuple[TokenStream, ...]
    tasks: TaskPlan | None
    dtype: str
    device: str
    computing: Computing

    @property
    def local(self) -> list[ModelFolder]:
        """The models that this process loads; servers are not among them."""
        return [m for m in self.models if isinstance(m, ModelFolder)]

    @cached_property
    def inspections(self) -> dict[str, Inspection]:
        """What lies in the folder of each model of this process, by label; reads all weights
        once."""
        return {model.label: llmquant.inspect(model.path) for model in self.local}

    @cached_property
    def tokenizers_sha256(self) -> dict[str, str]:
        return {label: tokenizer_sha256(tokenizer) for label, tokenizer in self.tokenizers.items()}


def make_plan(request: Request, tell: Callable[[str], None] = tell_nobody) -> EvaluationPlan:
    """Look everything up; ``tell`` gets what is said while a server is waited for.

    Raises:
        UsageError: a window, dtype, device or task that cannot be, a model given twice, tokenizers
            that differ.
        SourceError: the text is missing, empty or shorter than a window.
        CheckpointError: a folder that is not a model, or has no tokenizer.
        LlmquantError: a server that does not answer.
    """
    import llmquant

    # A suite has set them already; set again, too many would be warned of again.
    if request.threads != llmquant.set_threads():
        llmquant.set_threads(request.threads)
    device = llmquant.parse_device(request.device)
    llmquant.parse_dtype(
        request.dtype, device
    )  # a word that is none is refused before models are looked for
    models, reference = _find(request, tell)
    chosen = _dtype(request, device, models, reference)
    protocols = _protocols(request, models)
    tokenizers = _tokenizers(models, reference, request.tokenizer)
    documents = None if request.text is None else llmquant.read_documents(request.text)
    first = (reference or models[0]).label
    streams = tuple(
        _stream(p, tokenizers, first, documents, request)
        for p in protocols
        if documents is not None
    )
    _check_ids(streams, models)
    tasks = None
    if request.tasks is not None:
        from llmquant_eval.tasks.harness import plan_tasks

        tasks = plan_tasks(
            [n for n in request.tasks.split(",") if n],
            request.include_path,
            request.limit,
            request.log_samples,
        )
    return EvaluationPlan(
        tuple(models),
        reference,
        tokenizers,
        request.text,
        None if documents is None else documents.sha256,
        None if documents is None else _rows(documents, streams),
        streams,
        tasks,
        chosen.name,
        str(device),
        llmquant.Computing.of(device, chosen),
    )


def _dtype(
    request: Request,
    device: torch.device,
    models: Sequence[AnyModel],
    reference: ModelFolder | None,
) -> ChosenDtype:
    """The one dtype of all models: ``auto`` asks what suits the reference, or else the first
    folder."""
    import llmquant

    first = reference or next((m for m in models if isinstance(m, ModelFolder)), None)
    if first is None:
        return llmquant.parse_dtype(
            request.dtype, device
        )  # servers have their own; nothing is loaded here
    return llmquant.compute_dtype(first.path, request.dtype, device)


def _find(
    request: Request, tell: Callable[[str], None]
) -> tuple[list[AnyModel], ModelFolder | None]:
    """All models, the reference first unless it was named among the candidates, and the
    reference."""
    sources = list(request.candidates)
    if request.reference is not None and request.reference not in sources:
        sources.insert(0, request.reference)
    models = resolve_models(sources, Contact(request.retry_for, request.kept / "served", tell))
    reference = next((m for m in models if m.source == request.reference), None)
    if reference is not None and len(models) == 1 and request.cache is None:
        raise UsageError(
            f"{reference.source} is the reference and the only model; name a model to compare with it, "
            "or give --cache DIR to keep its distributions for later"
        )
    if isinstance(reference, ServedModel):
        raise UsageError(
            f"{reference.source} is a server, which does not give whole distributions; name a folder as the reference"
        )
    return models, reference


def _protocols(request: Request, models: Sequence[AnyModel]) -> list[WindowProtocol]:
    """The protocols asked for, checked against the context of every model."""
    limits = {m.label: n for m in models if (n := _longest_input(m)) is not None}
    smallest = min(limits.values(), default=None)
    window = default_window(smallest) if request.window is None else request.window
    protocols = [parse_protocol(name, window, request.bos_each) for name in request.protocols]
    ids = [p.perplexity_id for p in protocols]
    if len(set(ids)) < len(ids):
        raise UsageError(
            f"--protocol {request.protocol} names one protocol twice ({', '.join(ids)}); leave one out"
        )
    for protocol in protocols:
        if smallest is not None and protocol.window > smallest:
            label = min(limits, key=lambda m: limits[m])
            raise UsageError(
                f"a window of {protocol.window} tokens is longer than the {smallest} that {label} takes; "
                f"give --window {smallest} or less"
            )
    return protocols


def _longest_input(model: AnyModel) -> int | None:
    """A server's context also holds the target of the last token it is fed, and the token that it
    generates."""
    if isinstance(model, ServedModel):
        return None if model.endpoint.context is None else model.endpoint.context - 2
    return max_positions(model.path)


def _tokenizers(
    models: Sequence[AnyModel], reference: ModelFolder | None, given: str | None
) -> dict[str, Any]:
    """Each model's tokenizer by label; a served model has the one given, else the reference's, else
    a folder's."""
    import llmquant

    tokenizers = {
        m.label: llmquant.load_tokenizer(m.path) for m in models if isinstance(m, ModelFolder)
    }
    served = [m for m in models if isinstance(m, ServedModel)]
    if not served:
        if given is not None:
            raise UsageError(
                f"--tokenizer {given} is for served models; folders have their own, so leave it out"
            )
        return tokenizers
    if given is not None:
        shared = llmquant.load_tokenizer(given)
    elif tokenizers:
        shared = (
            tokenizers[reference.label]
            if reference is not None
            else next(iter(tokenizers.values()))
        )
    else:
        raise UsageError(
            f"{served[0].source} does not say how it tokenizes; give the folder of its model with --tokenizer"
        )
    return tokenizers | {m.label: shared for m in served}


def _check_ids(streams: Sequence[TokenStream], models: Sequence[AnyModel]) -> None:
    """Refuse token ids that a model's embedding has no row for.

    Raises:
        UsageError: naming the model.
    """
    highest = max((int(s.ids.max()) for s in streams), default=-1)
    for model in (m for m in models if isinstance(m, ModelFolder)):
        rows = vocabulary_size(model.path)
        if highest >= rows:
            raise UsageError(
                f"{model.label}: the tokenizer gives token id {highest}, but the model's embedding has {rows} rows; "
                "the tokenizer belongs to another model"
            )


def _rows(documents: Documents, streams: Sequence[TokenStream]) -> TextRows:
    """What became of the rows, those that a protocol had no use for among them."""
    useless = max((s.dropped for s in streams), key=lambda d: sum(d.values()), default={})
    dropped = Counter(documents.dropped) + Counter(useless)
    return TextRows(
        read=documents.rows_read,
        used=len(documents.rows) - sum(useless.values()),
        empty=documents.empty - useless.get("empty", 0),
        dropped=dict(sorted(dropped.items())),
        partly=dict(streams[0].partly if streams else {}),
    )


def _stream(
    protocol: WindowProtocol,
    tokenizers: dict[str, Any],
    first: str,
    documents: Documents,
    request: Request,
) -> TokenStream:
    """The one token stream of all models under a protocol."""
    assert request.text is not None  # there are documents
    stream = make_stream(protocol, tokenizers[first], documents, request.text, request.max_windows)
    for label, tokenizer in tokenizers.items():
        if tokenizer is not tokenizers[first]:
            other = make_stream(protocol, tokenizer, documents, request.text, request.max_windows)
            check_same_tokens(stream.ids, other.ids, first, label)
    return stream
