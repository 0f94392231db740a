"""plan: what a run would make and need, from config.json and the safetensors headers. Of the
weights only tied tensors that are stored twice are read.

Sizes are not estimated: every distinct (scheme, shape) is packed once by the real format on two
thin slices (64 and 128 rows of zeros), and since each tensor of every layout grows linearly with
the rows, two sizes give all others. The file's own header is composed and measured too.

What refuses a run refuses its plan: both begin with the same preparation, which builds the model
without weights.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedConfig

from llmquant.checkpoint.reader import TensorInfo
from llmquant.checkpoint.shards import Stored, header
from llmquant.checkpoint.sizes import Sizes
from llmquant.formats import Scheme
from llmquant.formats.engines import cautions, refusals
from llmquant.formats.rules import Beside
from llmquant.kernels import choose
from llmquant.models.architectures import Architecture
from llmquant.models.block_inputs import refuse_walk
from llmquant.models.from_folder import load_tokenizer
from llmquant.models.reading.linears import Linears
from llmquant.models.reading.stored_dtype import SOURCE, StoredReader
from llmquant.quantization.plan import WalkPlan
from llmquant.quantization.prepare import check_calibration, prepare, selected
from llmquant.recipe import Recipe
from llmquant.records import GroupSizeRecord
from llmquant.runtime.computing import Computing
from llmquant.runtime.devices import AUTO, parse_dtype


@dataclass(frozen=True, slots=True)
class PlannedModule:
    """One quantized linear of the plan, or the token embeddings."""

    name: str
    scheme: Scheme
    shape: tuple[int, int]
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """What the run would make.

    Attributes:
        modules: quantized linears, and the token embeddings where they are quantized.
        skipped: linears left alone → why.
        tensors: every tensor of the output by name.
        source_bytes: of the original's tensors.
        tensor_parallel: numbers of GPUs over which engines could split every quantized linear.
        suggestions: other group sizes that divide every selected linear.
        engines: serving engine → why it would refuse the result; an empty tuple where it takes it.
        cautions: serving engine → why its answers would not be the evaluated ones though it takes
            the result.
        kernels: llmquant's own kernel → how many of the linears it would run, and why not those
            before it.
        kernels_for: device and dtype of that: what ``auto`` means where a CPU runs it.
        architecture: where its decoder blocks and experts are.
        hidden: width of the hidden states.
        source: the original's tensors, as quantization reads them.
        notes: what people should know of the folder.
        recipe: with the group sizes that fit.
        regrouped: where these are not the wanted ones.
        stored: what is stored in another dtype than the original has, in words.
        embedding: name of the token embeddings, if they are quantized.
        head: the tensor that the head multiplies by, the embeddings' where it is tied to them.
    """

    model_type: str
    format: str
    modules: tuple[PlannedModule, ...]
    skipped: Mapping[str, str]
    tensors: Mapping[str, Stored]
    source_bytes: int
    tensor_parallel: tuple[int, ...]
    suggestions: tuple[int, ...]
    engines: Mapping[str, tuple[str, ...]]
    cautions: Mapping[str, tuple[str, ...]]
    kernels: Mapping[str, tuple[int, str]]
    kernels_for: Computing
    architecture: Architecture
    hidden: int
    source: Mapping[str, TensorInfo]
    recipe: Recipe
    notes: tuple[str, ...] = ()
    regrouped: tuple[GroupSizeRecord, ...] = ()
    stored: str | None = None
    embedding: str | None = None
    head: str | None = None

    @property
    def linears(self) -> tuple[PlannedModule, ...]:
        """The quantized modules without the embeddings."""
        return tuple(m for m in self.modules if m.name != self.embedding)

    @cached_property
    def tensor_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    @cached_property
    def bytes_on_disk(self) -> int:
        """Of a single weight file; each further shard adds some hundred bytes of header."""
        return self.tensor_bytes + len(header(self.tensors))

    @property
    def bits_per_weight(self) -> float:
        weights = sum(math.prod(m.shape) for m in self.modules)
        return sum(m.nbytes for m in self.modules) * 8 / weights


def _result(plan: WalkPlan) -> tuple[list[PlannedModule], dict[str, Stored]]:
    """What would be written: the quantized linears, and every tensor by name."""
    sizes = Sizes(plan.layout)
    modules: list[PlannedModule] = []
    tensors: dict[str, Stored] = {}
    for name, info in plan.reader.tensors.items():
        module = name.removesuffix(".weight")
        scheme = plan.selection.schemes.get(module) if name.endswith(".weight") else None
        if plan.repeats(name):
            continue
        if scheme is None:
            tensors[name] = Stored(info.dtype, info.shape)
            continue
        shape = plan.source.linears.shape(module)
        stored = sizes.tensors(scheme, shape, info.dtype)
        tensors.update({f"{module}.{suffix}": t for suffix, t in stored.items()})
        modules.append(
            PlannedModule(module, scheme, shape, sizes.nbytes(scheme, shape, info.dtype))
        )
    return modules, tensors


def make_plan(
    model: str | os.PathLike[str],
    recipe: Recipe,
    store_dtype: str = SOURCE,
    *,
    tokenizer: bool = False,
) -> Plan:
    """Plan a run.

    Args:
        model: folder or hub name.
        recipe: what would be done; needs no calibration source.
        store_dtype: as the run's.
        tokenizer: if the recipe needs text, refuse a folder whose tokenizer cannot be read, and of
            a recipe that names its text the numbers that cannot be right.

    Raises:
        what :func:`llmquant.quantize` raises for the same request before it reads a text: one
            function (:func:`llmquant.quantization.prepare.prepare`) answers for both.
    """
    plan = selected(prepare(model, recipe, store_dtype=store_dtype))
    if recipe.needs_text:
        refuse_walk(plan.model)
    reader, layout, selection = plan.reader, plan.layout, plan.selection
    if tokenizer and recipe.needs_text:
        load_tokenizer(reader.path)
        if recipe.calibration.source is not None:
            check_calibration(plan)
    modules, tensors = _result(plan)
    linears = [m for m in modules if m.name != selection.embedding]
    running = parse_dtype(AUTO, "cpu")
    beside = Beside.of(reader.config, selection.skipped)
    text = plan.model.config.get_text_config()
    return Plan(
        model_type=str(reader.config.get("model_type")),
        format=layout.name,
        modules=tuple(modules),
        skipped=selection.skipped,
        tensors=tensors,
        source_bytes=sum(i.nbytes for i in plan.source.original.tensors.values()),
        tensor_parallel=_tensor_parallel(linears, text),
        suggestions=_group_sizes(linears),
        engines=refusals(layout.name, selection.schemes, beside),
        cautions=cautions(layout.name, selection.schemes),
        kernels=_kernels(linears, running.dtype),
        kernels_for=Computing.of("cpu", running),
        architecture=plan.architecture,
        hidden=int(getattr(text, "hidden_size", 0)),
        source=dict(reader.tensors),
        recipe=plan.recipe,
        regrouped=selection.regrouped,
        notes=plan.source.notes,
        stored=reader.note() if isinstance(reader, StoredReader) else None,
        embedding=selection.embedding,
        head=_head(plan.source.linears),
    )


def _head(linears: Linears) -> str | None:
    module = linears.embedding[0] if linears.tied and linears.embedding else linears.head
    return module and f"{module}.weight"


def _tensor_parallel(modules: list[PlannedModule], config: PreTrainedConfig) -> tuple[int, ...]:
    """Splits that keep heads whole and every shard's columns in whole groups (and whole 32-bit
    words). Some configs have other keys for the heads, which transformers knows by the usual
    ones."""
    heads = [
        v
        for k in ("num_attention_heads", "num_key_value_heads")
        if isinstance(v := getattr(config, k, None), int)
    ]
    good = []
    for parts in (1, 2, 4, 8, 16):
        columns = all(
            m.shape[1] % (parts * math.lcm(m.scheme.spec.group_size or 1, 32)) == 0 for m in modules
        )
        rows = all(m.shape[0] % parts == 0 for m in modules)
        if (
            columns
            and rows
            and all(h % parts == 0 or parts % h == 0 for h in heads[1:])
            and heads[:1]
            and heads[0] % parts == 0
        ):
            good.append(parts)
    return tuple(good)


def _kernels(modules: list[PlannedModule], dtype: torch.dtype) -> dict[str, tuple[int, str]]:
    """Kernel on a CPU → (linears, why not the ones preferred to it)."""
    found: dict[str, tuple[int, str]] = {}
    for m in modules:
        kernel, refused = choose(m.scheme.spec, m.shape, torch.device("cpu"), dtype, m.scheme.g_idx)
        count, _ = found.get(kernel.name, (0, ""))
        found[kernel.name] = count + 1, "; ".join(f"{name}: {why}" for name, why in refused.items())
    return found


def _group_sizes(modules: list[PlannedModule]) -> tuple[int, ...]:
    return tuple(g for g in (16, 32, 64, 128, 256) if all(m.shape[1] % g == 0 for m in modules))
