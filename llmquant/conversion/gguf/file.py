"""A quantized folder → one GGUF file for llama.cpp, holding exactly the same numbers, or a refusal
that says which do not fit.

Linears go into the narrowest of Q4_0, Q4_1 and Q8_0 that holds them (:mod:`llmquant.formats.gguf`);
everything else keeps its dtype, except that vectors become float32, as llama.cpp wants. The rows of
q and k are reordered, because llama.cpp rotates pairs (i, i+1) where transformers rotates (i, i +
half): groups run along rows, so that moves whole rows of codes and scales.

Llama and Mistral models with a byte-level BPE tokenizer; others are refused by name. The file is
read back and compared tensor by tensor before it gets its name. Needs the ``gguf`` package
(imported when called).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.checkpoint.atomic import fsync_path
from llmquant.checkpoint.companions.originals import refuse_source
from llmquant.checkpoint.detect import quantization_of
from llmquant.checkpoint.gguf.cursor import package
from llmquant.checkpoint.gguf.folder import damaged
from llmquant.checkpoint.manifest import find_manifest
from llmquant.checkpoint.packed import PackedCheckpoint
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.conversion.gguf.metadata import GgufModel, describe, write_metadata
from llmquant.conversion.source import (
    Source,
    open_source,
    refuse_beyond_weights,
    refuse_changed,
)
from llmquant.errors import FormatError, LayoutError, ProofError, QuantizationError, UsageError
from llmquant.formats import Scheme
from llmquant.formats import gguf as blocks
from llmquant.models.reading.fit import fitted
from llmquant.weight import QuantizedWeight
from llmquant.written import FileKind, refuse_foreign

_ROPE = "rope_freqs.weight"
_DENSE = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


@dataclass(frozen=True, slots=True)
class GgufResult:
    """What was written: the file, and the type of every tensor by its name in it."""

    path: Path
    types: Mapping[str, str]
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Source:
    """A tensor to be: ``scheme`` is None for an unquantized one. :data:`_ROPE` has no source but
    the config."""

    name: str
    target: str
    scheme: Scheme | None


def export_gguf(
    model: str | os.PathLike[str], output: str | os.PathLike[str], *, overwrite: bool = False
) -> GgufResult:
    """Write a quantized folder as one GGUF file.

    Args:
        model: a folder in any layout that llmquant reads.
        output: the file; appears whole, after its proof, or not at all.
        overwrite: replace an existing file.

    Raises:
        UsageError: the file exists (with ``overwrite``: and is no GGUF file) or is a folder, its
            folder does not exist, or the ``gguf`` package is not installed.
        FormatError: an architecture, tokenizer, scheme or number that GGUF cannot hold exactly, or
            zero-points whose label is wrong.
        ProofError: the folder is not what its manifest says, or what was written is not what was
            read.
    """
    gguf = package()
    path = Path(output)
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file in it, such as {path / 'model.gguf'}")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; choose another name, or replace it with --overwrite")
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent} is not a folder; make it first")
    stored = CheckpointReader(model)
    refuse_source(path, model, stored.path)
    refuse_foreign(path, FileKind.GGUF)
    described = describe(stored)  # what GGUF cannot say is the cause, whatever else is wrong
    source = None if quantization_of(stored) is None else open_source(stored.path, None)
    if source is not None:
        refuse_beyond_weights(source, "gguf")
    else:
        refuse_changed(stored, find_manifest(stored.path))
    reader = fitted(stored).reader if source is None else source.reader
    described = replace(described, tied=bool(reader.config.get("tie_word_embeddings", False)))
    sources = _sources(gguf, reader, described, None if source is None else source.packed)
    read = _Reader(reader, source, described)
    # Which type a tensor gets depends on its numbers, and the header comes first: hence two passes,
    # one tensor in memory.
    kinds = {s.target: read.kind(s) for s in sources}
    partial = path.with_name(f".{path.name}.partial")
    try:
        writer = gguf.GGUFWriter(partial, "llama")
        write_metadata(gguf, writer, described, kinds.values())
        _write(gguf, writer, sources, kinds, read)
        _prove(gguf, partial, sources, kinds, read)
        fsync_path(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return GgufResult(path, kinds, path.stat().st_size)


def _sources(
    gguf: Any, reader: CheckpointReader, model: GgufModel, packed: PackedCheckpoint | None
) -> list[_Source]:
    """Every tensor of the folder with its name in the file; refuses what can be refused without
    numbers."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.layers)
    schemes = {} if packed is None else packed.schemes
    dense = reader.tensors if packed is None else packed.others
    found: list[_Source] = []
    for name in [*dense, *(f"{m}.weight" for m in schemes)]:
        if model.tied and name == "lm_head.weight":
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None or target.endswith(".bias"):
            raise LayoutError(f"{reader.path}: {name} has no place in llama.cpp's llama models")
        found.append(_Source(name, target, schemes.get(name.removesuffix(".weight"))))
    if model.rope_factors is not None:
        found.append(_Source("config.json", _ROPE, None))
    for module, scheme in schemes.items():
        assert packed is not None  # schemes came from it
        # Whether an announced g_idx says anything is known only from its numbers.
        reason = blocks.why_not(replace(scheme, g_idx=False), packed.shape(module))
        if reason:
            raise LayoutError(f"{reader.path}: {module}: {reason}")
    return found


@dataclass(frozen=True, slots=True)
class _Reader:
    """Tensors in the order of rows that llama.cpp wants."""

    reader: CheckpointReader
    source: Source | None
    model: GgufModel

    def weight(self, source: _Source) -> QuantizedWeight:
        module = source.name.removesuffix(".weight")
        assert self.source is not None  # asked only for quantized tensors
        weight = self.source.weight(module)
        if weight.g_idx is not None:
            reason = blocks.why_not(Scheme(weight.spec, g_idx=True), weight.shape)
            raise LayoutError(f"{self.reader.path}: {module}: {reason}")
        order = self._order(source, weight.shape[0])
        return QuantizedWeight(
            weight.codes[order], weight.scales[order], weight.zeros[order], weight.spec
        )

    def dense(self, source: _Source) -> Tensor:
        if source.target == _ROPE:
            assert self.model.rope_factors is not None  # listed only then
            return self.model.rope_factors
        tensor = self.reader.read(source.name)
        if tensor.ndim == 1 and tensor.dtype in _DENSE:
            return tensor.to(torch.float32)
        return tensor[self._order(source, tensor.shape[0])]

    def kind(self, source: _Source) -> str:
        if source.scheme is not None:
            weight = self.weight(source)
            try:
                return blocks.smallest(weight)
            except FormatError as e:
                raise LayoutError(f"{self.reader.path}: {source.name}: {e}") from e
        dtype = self.dense(source).dtype
        if dtype not in _DENSE:
            raise LayoutError(
                f"{self.reader.path}: {source.name} is {dtype}, which is not a weight GGUF holds"
            )
        return _DENSE[dtype]

    def bytes(self, source: _Source, kind: str) -> Tensor:
        """uint8 ``[..., bytes of a row]``."""
        if source.scheme is not None:
            return blocks.pack(self.weight(source), kind)  # type: ignore[arg-type]  # kind() gave one of them
        return self.dense(source).contiguous().view(torch.uint8)

    def _order(self, source: _Source, rows: int) -> Tensor:
        """Row indices: (i, i + half) pairs of every head side by side for q and k, as they are
        otherwise."""
        heads = {"attn_q": self.model.heads, "attn_k": self.model.kv_heads}.get(
            source.target.split(".")[-2]
        )
        index = torch.arange(rows)
        return index if heads is None else index.view(heads, 2, -1).transpose(1, 2).reshape(-1)


def _write(
    gguf: Any, writer: Any, sources: list[_Source], kinds: Mapping[str, str], read: _Reader
) -> None:
    for source in sources:
        data = read.bytes(source, kinds[source.target])
        raw = gguf.GGMLQuantizationType[kinds[source.target]]
        writer.add_tensor_info(
            source.target, tuple(data.shape), data.numpy().dtype, data.numel(), raw_dtype=raw
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for source in sources:
        writer.write_tensor_data(read.bytes(source, kinds[source.target]).numpy())
    writer.close()


def _prove(
    gguf: Any, path: Path, sources: list[_Source], kinds: Mapping[str, str], read: _Reader
) -> None:
    """Every tensor of the file dequantizes, by the package's own code, to what the folder holds."""
    written = {t.name: t for t in gguf.GGUFReader(path).tensors}
    if written.keys() != kinds.keys():
        raise ProofError(
            f"{path} holds other tensors than were written: {sorted(written.keys() ^ kinds.keys())[:3]}"
        )
    for source in sources:
        tensor = written[source.target]
        expected = (
            read.weight(source).dequantize()
            if source.scheme is not None
            else read.dense(source).to(torch.float32)
        )
        found = torch.from_numpy(
            gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()
        ).view(expected.shape)
        if tensor.tensor_type.name != kinds[source.target] or not torch.equal(
            found.to(torch.float32), expected
        ):
            raise ProofError(f"{path}: {source.target} does not hold the numbers of {source.name}")


def read_weights(path: str | os.PathLike[str]) -> Iterator[tuple[str, QuantizedWeight]]:
    """Q4_0, Q4_1 and Q8_0 tensors of a GGUF file, by their names in it, rows in llama.cpp's order.

    Raises:
        FormatError: no GGUF file, or a Q4_1 tensor that is on no integer grid.
        CheckpointError: a tensor has numbers that are not finite.
    """
    gguf = package()
    try:
        tensors = gguf.GGUFReader(path).tensors
    except (ValueError, OSError, IndexError) as e:
        raise FormatError(f"{path} cannot be read as GGUF: {e}") from e
    for tensor in tensors:
        kind = tensor.tensor_type.name
        if kind in blocks.BLOCK_BYTES and tensor.data.ndim == 2:
            try:
                yield tensor.name, blocks.unpack(torch.from_numpy(tensor.data.copy()), kind)
            except FormatError as e:
                raise e.at(f"{path}: {tensor.name}") from e
            except QuantizationError as e:
                raise damaged(path, tensor.name) from e
