"""A request, and the plan made of it: all that can be looked up or refused before a weight is read.

``Request`` is the command line as a value and can write itself back as one, so a Report carries the line that repeats
it. ``Plan`` holds the token stream, the windows and the models' paths: every model must cut the text into the same
tokens and take windows of that length.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from llmquant.errors import UsageError
from llmquant_eval import text
from llmquant_eval.models import ModelPath, max_positions, resolve_device, resolve_dtype, resolve_models
from llmquant_eval.protocols import GptqProtocol, Window, default_window, parse_protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Request:
    """What ``llmquant eval`` was asked for; the fields are its options."""

    candidates: tuple[str, ...]
    text: str
    reference: str | None = None
    protocol: str | None = None
    window: int | None = None
    max_windows: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    kernel: str = "auto"
    batch_size: int | None = None
    cost: bool = True
    noise_floor: bool = True

    def __post_init__(self) -> None:
        if not self.candidates:
            raise UsageError("name at least one model to evaluate")
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"--batch-size {self.batch_size} feeds nothing; give 1 or more")
        if self.protocol is not None and self.window is not None:
            raise UsageError("--protocol and --window both set the window; give one of them")

    def command(self) -> str:
        """The command line that repeats this run; options that stand at their default are left out."""
        words = ["llmquant", "eval", *self.candidates, "--text", self.text]
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name in ("candidates", "text") or value == option.default:
                continue
            name = option.name.replace("_", "-")
            words += [f"--no-{name}"] if value is False else [f"--{name}", str(value)]
        return shlex.join(words)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What a request means. ``ids`` int64 ``[tokens]``; ``windows`` of the ``windows_available`` are scored."""

    models: tuple[ModelPath, ...]
    reference: ModelPath | None
    tokenizers_sha256: dict[str, str]
    text_sha256: str
    ids: Tensor
    protocol: GptqProtocol
    windows: Sequence[Window]
    windows_available: int
    dtype: str
    device: str


def make_plan(request: Request) -> Plan:
    """Look everything up.

    Raises:
        UsageError: a window, dtype or device that cannot be, a model given twice, tokenizers that differ.
        SourceError: the text is missing, empty or shorter than a window.
        CheckpointError: a folder that is not a model, or has no tokenizer.
    """
    import llmquant

    dtype, device = resolve_dtype(request.dtype), resolve_device(request.device)
    found, reference = _find(request)
    protocol = _protocol(request, found)
    documents = llmquant.read_documents(request.text)
    ids, hashes = _tokens(found, reference or found[0], documents.text(), request.text)
    windows = text.select_windows(protocol, len(ids), request.max_windows, request.text)
    available = len(protocol.windows(len(ids)))
    return Plan(
        tuple(found), reference, hashes, documents.sha256, ids, protocol, windows, available, dtype, device
    )  # fmt: skip


def _find(request: Request) -> tuple[list[ModelPath], ModelPath | None]:
    """All models, the reference first unless it was named among the candidates, and the reference."""
    sources = list(request.candidates)
    if request.reference is not None and request.reference not in sources:
        sources.insert(0, request.reference)
    found = resolve_models(sources)
    reference = next((m for m in found if m.source == request.reference), None)
    if reference is not None and len(found) == 1:
        raise UsageError(f"{reference.source} is the reference and the only model; name a model to compare with it")
    return found, reference


def _protocol(request: Request, found: Sequence[ModelPath]) -> GptqProtocol:
    """The protocol asked for, checked against the context of every model."""
    limits = {m.label: n for m in found if (n := max_positions(m.path)) is not None}
    smallest = min(limits.values(), default=None)
    if request.protocol is not None:
        protocol = parse_protocol(request.protocol)
    else:
        protocol = GptqProtocol(default_window(smallest) if request.window is None else request.window)
    if smallest is not None and protocol.window > smallest:
        label = min(limits, key=lambda m: limits[m])
        raise UsageError(
            f"a window of {protocol.window} tokens is longer than the {smallest} that {label} takes; "
            f"give --window {smallest} or less"
        )
    return protocol


def _tokens(found: Sequence[ModelPath], first: ModelPath, words: str, source: str) -> tuple[Tensor, dict[str, str]]:
    """The one token stream of all models, and each tokenizer's hash by label."""
    tokenizers = {m.label: text.load_tokenizer(m.path) for m in found}
    ids = text.encode(tokenizers[first.label], words, source)
    for m in found:
        if m is not first:
            text.check_same_tokens(ids, text.encode(tokenizers[m.label], words, source), first.label, m.label)
    return ids, {label: text.tokenizer_sha256(tokenizer) for label, tokenizer in tokenizers.items()}
