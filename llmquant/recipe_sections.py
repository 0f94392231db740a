"""The sections of a recipe, each with its defaults and what it refuses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from llmquant.spec import QuantSpec


class Strict(BaseModel):
    """Immutable; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Fitting(Strict):
    """A section with a number that is fitted to the model, unless a key ``strict_…`` is true."""

    @model_serializer(mode="wrap")
    def _without_false(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Not written where it is off: earlier versions do not know the key, and hashes stay.
        fields: dict[str, Any] = dump(self)
        return {k: v for k, v in fields.items() if not k.startswith("strict_") or v}


class Sized(Fitting):
    """A grid whose group size is the wanted one, or with ``strict_groups`` that one or none."""

    strict_groups: bool = False


class Weights(Sized):
    """The grid. ``group_size: -1`` is one group per row; ``activations: int8-dynamic`` tells
    engines to quantize inputs too.

    A group size is the wanted one: where it does not divide a linear's columns, a smaller one is
    used (:mod:`llmquant.formats.group_sizes`). ``strict_groups`` refuses such a model instead, for
    overrides too.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    activations: Literal["none", "int8-dynamic"] = "none"

    @property
    def spec(self) -> QuantSpec:
        return QuantSpec(
            self.bits, None if self.group_size == -1 else self.group_size, self.symmetric
        )

    def with_spec(self, spec: QuantSpec) -> Weights:
        """The same with another grid."""
        size = -1 if spec.group_size is None else spec.group_size
        grid = {"bits": spec.bits, "group_size": size, "symmetric": spec.symmetric}
        return Weights.model_validate({**self.model_dump(), **grid})

    @model_validator(mode="after")
    def _possible(self) -> Weights:
        _ = self.spec  # raises SpecError, a ValueError, which pydantic reports with its place
        return self


class Embeddings(Sized):
    """The token embeddings, and the head with them; symmetric. Where no group size is given, 8 bits
    have a scale per row and 4 bits groups of 32. A size that does not divide is fitted as those of
    ``Weights`` are, by a ``strict_groups`` of this section refused.

    A head that is tied to the embeddings shares their packed tensors. One of its own gets the same
    grid as a linear, unless ``head: false`` keeps it as it is or the recipe selects it by itself.
    """

    bits: Literal[4, 8] = 8
    group_size: int = -1
    head: bool = True

    @model_validator(mode="before")
    @classmethod
    def _usual_group(cls, data: object) -> object:
        if isinstance(data, dict) and data.get("bits") == 4:
            return {"group_size": 32, **data}
        return data

    @property
    def weights(self) -> Weights:
        return Weights(bits=self.bits, group_size=self.group_size)

    @model_validator(mode="after")
    def _possible(self) -> Embeddings:
        _ = self.weights
        return self


class Override(Strict):
    """Other weights for the linears that ``match``; what is not given is as in ``Recipe.weights``.
    The first match counts."""

    match: str = Field(min_length=1)
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    activations: Literal["none", "int8-dynamic"] | None = None

    def applied_to(self, weights: Weights) -> Weights:
        changes = self.model_dump(exclude={"match"}, exclude_none=True)
        return Weights.model_validate({**weights.model_dump(), **changes})

    @classmethod
    def between(cls, match: str, weights: Weights, wanted: Weights) -> Override:
        """The override that makes ``wanted`` of the recipe's ``weights``."""
        before, after = weights.model_dump(), wanted.model_dump()
        return cls(match=match, **{k: v for k, v in after.items() if v != before[k]})


class Scales(Strict):
    """Scale search; see :class:`llmquant.algorithms.scale_search.ScaleSearch`. ``steps: 0`` is
    plain min-max."""

    steps: int = Field(48, ge=0, le=1000)
    smallest: float = Field(0.35, gt=0, le=1)
    norm: float = Field(2.0, gt=0, allow_inf_nan=False)
    weighted: bool = False


class GPTQ(Strict):
    """See :class:`llmquant.algorithms.gptq.GPTQOptions`."""

    block_size: int = Field(128, ge=1)
    damping: float = Field(0.01, gt=0, le=1)
    act_order: Literal["static", "off", "group"] = "static"
    true_sequential: bool = True
    asymmetric: float = Field(0.0, ge=0, le=1)
    passes: int = Field(0, ge=0, le=100)

    @field_validator("act_order", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        return "off" if value is False else value  # what YAML makes of a bare word off


class Tune(Strict):
    """Moves codes and scales of a whole block together; see
    :class:`llmquant.algorithms.block_tuning.TuneOptions`.

    ``batch_size`` is in calibration windows, and replaces ``calibration.batch_size`` for the whole
    run.
    """

    steps: int = Field(200, ge=1)
    lr: float = Field(0.002, gt=0, le=1)
    scale_lr: float = Field(0.001, ge=0, le=1)
    batch_size: int = Field(4, ge=1)
    checks: int = Field(4, ge=1)
    patience: int = Field(2, ge=1)
    target: Literal["original", "block"] = "original"


class AWQ(Strict):
    """Scales input channels before rounding and folds the inverse into what comes before; see
    :mod:`llmquant.algorithms.awq`."""

    grid: int = Field(20, ge=1, le=1000)
    duo_scaling: Literal["both", "on", "off"] = "both"
    steps: int = Field(16, ge=0, le=1000)

    @field_validator("duo_scaling", mode="before")
    @classmethod
    def _word(cls, value: object) -> object:
        return (
            {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
        )  # YAML's bare on and off


class Smooth(Strict):
    """SmoothQuant: moves large activations into the weights before 8-bit rounding of both; see
    :mod:`llmquant.quantization.steps.smoothquant`.

    ``alpha: auto`` tries 0.1 … 0.9 at each place. ``pairs: norms`` folds into norms only, ``all``
    also from linear to linear.
    """

    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = 0.5
    pairs: Literal["norms", "all"] = "norms"


class Rotation(Strict):
    """Rotates the model before anything else, without changing what it computes; see
    :mod:`llmquant.models.rotation.rotated`."""

    residual: Literal["hadamard", "random", "off"] = "hadamard"
    heads: bool = True
    seed: int = Field(0, ge=0, le=2**63 - 2)

    @field_validator("residual", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        return "off" if value is False else value  # what YAML makes of a bare word off

    @model_validator(mode="after")
    def _something(self) -> Rotation:
        if self.residual == "off" and not self.heads:
            raise ValueError("residual: off and heads: false rotate nothing; leave the section out")
        return self


class QAT(Strict):
    """Training with quantized weights after everything else, towards the original's logits; see
    :mod:`llmquant.training`.

    ``size``: ``scales`` trains scales (and norms), ``codes`` every weight's code too, ``lora``
    codes through adapters of ``rank`` that are merged before rounding. ``norms: auto`` trains
    norms where a linear is asymmetric. ``source`` is the text, by default the calibration's;
    ``nsamples`` of its windows are used, all of them where it is null, and ``heldout`` others
    decide which state is kept. ``top_k`` of the original's logits are kept for each token, the
    rest as one number; 0 compares whole vocabularies and keeps the original in memory.
    ``lr`` is a share of a scale or gain, ``codes_lr`` of a code, ``lora_lr`` Adam's step for
    adapters. ``batch_size`` windows make a step, ``micro_batch`` of them at a time. The held-out
    text is measured ``checks`` times; after ``patience`` of them without a new best it ends.
    """

    size: Literal["scales", "codes", "lora"] = "scales"
    steps: int = Field(200, ge=1)
    batch_size: int = Field(8, ge=1)
    micro_batch: int = Field(1, ge=1)
    lr: float = Field(0.002, gt=0, le=1)
    codes_lr: float = Field(0.01, gt=0, le=1)
    lora_lr: float = Field(0.0005, gt=0, le=1)
    rank: int = Field(16, ge=1)
    norms: Literal["auto", "on", "off"] = "auto"
    warmup: float = Field(0.05, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0, le=1)
    clip: float = Field(1.0, gt=0, allow_inf_nan=False)
    top_k: int = Field(64, ge=0)
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    hidden_loss: float = Field(0.0, ge=0, allow_inf_nan=False)
    next_token_loss: float = Field(0.0, ge=0, allow_inf_nan=False)
    source: str | None = None
    nsamples: int | None = Field(None, ge=1)
    seqlen: int = Field(512, ge=8)
    heldout_source: str | None = None
    heldout: int = Field(16, ge=1)
    checks: int = Field(10, ge=1)
    patience: int = Field(4, ge=1)

    @field_validator("norms", mode="before")
    @classmethod
    def _word(cls, value: object) -> object:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _possible(self) -> QAT:
        if self.micro_batch > self.batch_size:
            raise ValueError("micro_batch is more than batch_size, of which it is a part")
        return self


class CalibrationOptions(Fitting):
    """Which text is shown to the model: ``nsamples`` windows of ``seqlen`` tokens of ``source``, or
    of as many as the model has positions for; with ``strict_seqlen`` such a model is refused.

    ``all_experts`` shows every token to every expert of a mixture while statistics are taken, not
    only the routed ones. ``first_token_share``: see :class:`llmquant.stats.InputStats`; 1/64, the
    default, is a third less KL on a real model at 4 bits (docs/decisions.md), 0 switches it off.
    """

    source: str | None = None
    nsamples: int = Field(128, ge=1)
    seqlen: int = Field(2048, ge=8)
    strict_seqlen: bool = False
    packing: Literal["concat", "sample"] = "concat"
    batch_size: int = Field(8, ge=1)
    all_experts: bool | None = None
    first_token_share: float = Field(1 / 64, ge=0, lt=1)

    @field_validator("all_experts")
    @classmethod
    def _off_is_unset(cls, value: bool | None) -> bool | None:
        return value or None  # a recipe that says no is one that says nothing, also in its hash
