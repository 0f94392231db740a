"""A written graph, read back: its nodes as the ``onnx`` package has them, and the bytes of its
initializers as they lie in its data file."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from llmquant.conversion.onnx.environment import OnnxEnvironment
from llmquant.errors import ProofError

_DTYPES = {
    "FLOAT": torch.float32,
    "FLOAT16": torch.float16,
    "BFLOAT16": torch.bfloat16,
    "UINT8": torch.uint8,
    "INT8": torch.int8,
    "INT32": torch.int32,
    "INT64": torch.int64,
}


@dataclass(frozen=True, slots=True)
class Node:
    """One node: its operator, the names of its inputs, and its attributes that are integers."""

    name: str
    op: str
    inputs: tuple[str, ...]
    ints: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Initializer:
    """Where one constant tensor lies: in ``file`` at ``offset``, or in ``bytes`` as base64."""

    dtype: str
    shape: tuple[int, ...]
    file: str | None = None
    offset: int = 0
    length: int = 0
    bytes: str | None = None

    @property
    def is_float(self) -> bool:
        return self.dtype in ("FLOAT", "FLOAT16", "BFLOAT16")


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph beside its data file.

    Attributes:
        folder: where both lie.
    """

    folder: Path
    nodes: tuple[Node, ...]
    initializers: Mapping[str, Initializer]

    def tensor(self, name: str) -> Tensor:
        """An initializer as it is on the disk.

        Raises:
            ProofError: there is none of that name, its bytes are not there, or they are no dtype
                that is read here.
        """
        place = self.initializers.get(name)
        if place is None:
            raise ProofError(f"{self.folder}: the graph has no initializer {name}")
        if place.dtype not in _DTYPES:
            raise ProofError(f"{self.folder}: {name} is {place.dtype}, which is not read back")
        raw = self.raw(name)
        dtype = _DTYPES[place.dtype]
        if len(raw) != math.prod(place.shape) * dtype.itemsize:
            raise ProofError(f"{self.folder}: {name} has {len(raw)} bytes for {list(place.shape)}")
        if not raw:
            return torch.empty(place.shape, dtype=dtype)
        return torch.frombuffer(bytearray(raw), dtype=dtype).view(place.shape)

    def raw(self, name: str) -> bytes:
        """The bytes of an initializer."""
        place = self.initializers[name]
        if place.file is None:
            return base64.b64decode(place.bytes or "")
        try:
            with (self.folder / place.file).open("rb") as f:
                f.seek(place.offset)
                raw = f.read(place.length)
        except OSError as e:
            raise ProofError(f"{self.folder / place.file} cannot be read back: {e}") from e
        if len(raw) != place.length:
            raise ProofError(f"{self.folder / place.file} ends before {name} does")
        return raw

    def overwrite(self, name: str, value: Tensor) -> None:
        """Put other numbers of the same dtype and shape into an initializer.

        Raises:
            ProofError: it is of another dtype or size.
        """
        place = self.initializers[name]
        raw = value.contiguous().view(torch.uint8).numpy().tobytes()
        if place.file is None or len(raw) != place.length or _DTYPES[place.dtype] != value.dtype:
            raise ProofError(
                f"{self.folder}: {name} has no place for {value.dtype} {list(value.shape)}"
            )
        with (self.folder / place.file).open("r+b") as f:
            f.seek(place.offset)
            f.write(raw)


def read_graph(environment: OnnxEnvironment, path: Path) -> Graph:
    """Read a graph back with the ``onnx`` package of its environment.

    Raises:
        ProofError: what it says of the graph makes no sense.
        LlmquantError: it cannot be read.
    """
    said = environment.script(f"reading {path.name} back", "graph", path.parent, str(path))
    try:
        facts = json.loads(said)
        nodes = TypeAdapter(tuple[Node, ...]).validate_python(facts["nodes"])
        initializers = TypeAdapter(dict[str, Initializer]).validate_python(facts["initializers"])
    except (ValueError, KeyError, ValidationError) as e:
        raise ProofError(f"{path} was read back as something that is no graph: {e}") from e
    return Graph(path.parent, nodes, initializers)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """uint8 ``[rows, bytes]`` → uint8 ``[rows, count]``: values of 2, 4 or 8 bits, the lowest bits
    of a byte first, as MatMulNBits stores them."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    values = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return values.reshape(packed.shape[0], -1)[:, :count].contiguous()
