"""What is recorded of a run: one class for each thing that is said of it, from the place that
measures it through the journal to the manifest.

Fields that depend on the machine and the moment (seconds, bytes in memory) are in subclasses, which
the manifest writes without them: the same run gives the same bytes.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer


class Record(BaseModel):
    """Immutable; another version's unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModuleRecord(Record):
    """What happened to one linear. Another tool's leaves no errors and no counts.

    Attributes:
        spec: its grid, as text.
        shape: ``(out, in)``.
        digest: :meth:`llmquant.QuantizedWeight.digest` as the algorithm returned it.
        weight_error: ``|W - Q|^2 / |W|^2``.
        output_error: relative output error on the calibration inputs; None for a data-free method,
            and for a tuned block, whose error is measured as a whole.
        damping: GPTQ's damping as finally used; larger than the recipe's when Cholesky failed.
        dead: input channels that were zero for every calibration token.
        tokens: calibration tokens seen.
        dropped: tokens left out for NaN or Inf.
        fallback: why the recipe's method was not used and the weight rounded to nearest instead,
            else None.
    """

    spec: str
    shape: tuple[int, int]
    digest: str
    weight_error: float | None = None
    output_error: float | None = None
    damping: float | None = None
    dead: int = 0
    tokens: int = 0
    dropped: int = 0
    fallback: str | None = None


class ModuleReport(ModuleRecord):
    """The same beside what rounding it took.

    Attributes:
        name: full module name.
        seconds: time spent rounding.
        peak: the most bytes that this process had in RAM up to then.
        coarse: scales so small that fp16 has fewer than five bits for them.
        wide: scales that only a wider dtype than fp16 holds.
    """

    name: str
    weight_error: float
    seconds: float = 0.0
    peak: int = 0
    coarse: int = 0
    wide: int = 0


class TuneRecord(Record):
    """Mean squared error of a block's output on the calibration text before and after it was tuned.

    ``step`` of ``steps`` taken gave the state that was kept; 0 is the rounding algorithm's own.
    """

    before: float
    after: float
    step: int
    steps: int


class TuneReport(TuneRecord):
    """The same beside the seconds that tuning took."""

    seconds: float


class QatRecord(Record):
    """What training with quantized weights did.

    Attributes:
        options: the recipe's section, with every default.
        start_weights_sha256: of the quantized folder that it began with.
        reference: the original's name.
        reference_weights_sha256: of the original.
        source, source_sha256, ids_sha256: the text, its content, and the windows of token ids.
        windows, heldout: how many were trained on, and how many decided.
        tokens: to learn in an epoch.
        before, after: held-out KL to the original in nats, of the start and of what was kept.
        step: after how many of ``steps`` taken that was; 0 is the start.
        stopped: why it ended early, else None.
        norms: gains that were trained.
        codes, codes_changed: of the trained linears, and how many are not the start's; both 0 in a
            record of an earlier version.
        device, dtype: that products were computed on and in.
        processes: that shared the work.
    """

    options: dict[str, str | int | float | None]
    start_weights_sha256: str
    reference: str
    reference_weights_sha256: str
    source: str
    source_sha256: str
    ids_sha256: str
    windows: int
    heldout: int
    tokens: int
    before: float
    after: float
    step: int
    steps: int
    stopped: str | None = None
    norms: int = 0
    codes: int = 0
    codes_changed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    processes: int = 1


class PairRecord(Record):
    """What AWQ or SmoothQuant did between a producer of channels and the linears that read them, by
    full name.

    Attributes:
        ratio: the winning exponent (SmoothQuant's alpha); None where nothing was scaled.
        duo: whether the winner looks at the weights' magnitudes.
        before, after: relative output error of the readers when rounded to nearest (under
            SmoothQuant with their inputs rounded too); None where no search was made.
        reason: why nothing was scaled, else None.
        method: ``awq`` or ``smooth``.
    """

    producer: str
    readers: tuple[str, ...]
    ratio: float | None = None
    duo: bool = False
    before: float | None = None
    after: float | None = None
    reason: str | None = None
    method: str = "awq"


class PairReport(PairRecord):
    """The same beside the seconds that the search took."""

    seconds: float = 0.0


class RotationRecord(Record):
    """What was rotated: names of the matrices, the seed, norms that were absorbed, and whether the
    head was untied."""

    residual: str | None
    heads: str | None
    seed: int
    norms: int
    untied: bool


class GroupSizeRecord(Record):
    """Linears, or the token embeddings, with another group size than the one wanted.

    Attributes:
        linears: full names, with ``*`` for the numbers of blocks and experts.
        count: how many they are.
        columns: inputs of each.
        wanted: by the recipe.
        used: instead; -1 is one scale per row.
        reason: why.
        embeddings: whether these are the token embeddings.
    """

    linears: tuple[str, ...]
    count: int
    columns: int
    wanted: int
    used: int
    reason: str
    embeddings: bool = False

    @model_serializer(mode="wrap")
    def _without_false(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Not written of linears: earlier versions do not know the key.
        fields: dict[str, Any] = dump(self)
        return {k: v for k, v in fields.items() if k != "embeddings" or v}

    def __str__(self) -> str:
        leaves = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in self.linears))
        size = "one scale per row" if self.used == -1 else f"groups of {self.used}"
        linears = "1 linear" if self.count == 1 else f"{self.count} linears"
        linears = "the embeddings" if self.embeddings else linears
        return f"{size} instead of {self.wanted} for {linears} ({leaves}): {self.reason}"


class GraphCheck(Record):
    """A few tokens run through an exported graph and through the folder it was made of, in float32.

    Attributes:
        tokens: how many, drawn at random.
        largest_logit: of the folder's logits, by magnitude.
        max_difference: of a logit.
        kl_mean: of the export from the folder, nats a token.
        top1_agreement: share of the tokens after which both find the same one most likely.
    """

    tokens: int
    largest_logit: float
    max_difference: float
    kl_mean: float
    top1_agreement: float


class OnnxRecord(Record):
    """What an ONNX export holds, as it was read back from the disk.

    Attributes:
        provider: the execution provider that the graph is for.
        scheme: of the linears, for people.
        parameters: number of the model's weights.
        quantized: how many of them are integers in the graph.
        weights: ``packed``, ``fp32``, ``fp16`` or ``int8``.
        dtype: of what is computed between the linears.
        accuracy_level: of MatMulNBits: 0 leaves activations alone, 4 rounds them to int8; None
            where there is none.
        head: what was asked for the output head.
        tools: versions of the packages that wrote the graph.
        nodes: linear of the folder → the node that holds its numbers.
        requantized: node → what the tools rounded a float weight to.
        altered: tensor of the folder → in what the graph's differs.
        unchanged: how many other tensors are the folder's.
        check: None where the graph cannot run here.
    """

    provider: str
    scheme: str
    parameters: int
    quantized: int
    weights: str
    dtype: str
    accuracy_level: int | None
    head: str
    tools: dict[str, str]
    nodes: dict[str, str]
    requantized: dict[str, str]
    altered: dict[str, str]
    unchanged: int
    check: GraphCheck | None = None
