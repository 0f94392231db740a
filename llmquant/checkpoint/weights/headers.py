"""What a safetensors header says, and what a file is that has none.

A header is read without the weights. A file that the library refuses is nearly always not what its
name says (a Git LFS pointer, a web page that a download saved, a pickle that somebody renamed), or
not all of it is there: the first bytes and the size tell which, and the message says that.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from llmquant.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_MOST = 100_000_000  # bytes of a header that the library reads
FP8 = tuple(dtype for name, dtype in DTYPES.items() if name.startswith("F8"))
# What pickles begin with: torch's archives, and the older kinds.
PICKLED = (b"PK\x03\x04", b"\x80\x02", b"\x80\x04")
# What files that are no weights begin with → what they are, and how one gets the weights.
_STRANGERS: tuple[tuple[tuple[bytes, ...], str], ...] = (
    (
        (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/"),
        "a Git LFS pointer, not the file itself; run `git lfs pull` in its folder, or fetch it with `hf download`",
    ),
    (
        (b"# xet version",),
        "a Xet pointer, not the file itself; fetch it with `hf download`",
    ),
    (
        (b"<!", b"<html", b"<HTML", b"<head", b"<?xml"),
        "a web page (HTML), not the file itself: a server's error or login page was saved under its name; "
        "fetch it again, with `hf download`",
    ),
    (
        PICKLED,
        "a pickle under another name; where it is called pytorch_model.bin, llmquant import converts it",
    ),
    ((b"GGUF",), "a GGUF file under another name; llmquant reads safetensors"),
    ((b"\x1f\x8b",), "a gzip archive; unpack it"),
    (
        (b"{", b"["),
        "JSON, not the file itself: a server's answer was saved under its name; fetch it again, with `hf download`",
    ),
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a safetensors header says of one tensor; ``stored`` is its name in the file.
    ``made``: what is read is made of what is stored."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    stored: str
    made: bool = False


def stranger(path: Path, but: tuple[bytes, ...] = ()) -> str | None:
    """What a file is that cannot be read as what its name says, as far as its first bytes tell.

    Args:
        but: beginnings that say nothing here, as ``{`` of a JSON file.
    """
    try:
        with path.open("rb") as f:
            head = f.read(512)
    except OSError:
        return None
    if not head:
        return "empty (0 bytes): a download or a copy stopped; fetch it again"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    for beginnings, what in _STRANGERS:
        if start.startswith(beginnings) and not (but and start.startswith(but)):
            return what
    return None


def read_header(path: Path) -> dict[str, TensorInfo]:
    """One file's tensors by name, without reading weights.

    Raises:
        CheckpointError: not safetensors, damaged or not whole; says what it is instead, if that can
            be told.
    """
    try:
        with safe_open(path, framework="pt"):
            # the library's own reading refuses every header that is malformed or does not cover the
            # file exactly
            pass
        with path.open("rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(length))
    except (SafetensorError, OSError, struct.error, ValueError, RecursionError) as e:
        raise CheckpointError(_refusal(path, e)) from e
    header.pop("__metadata__", None)
    infos: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name} has dtype {entry['dtype']}, which llmquant does not read"
            )
        shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
        infos[name] = TensorInfo(path, dtype, shape, stop - start, name)
    return infos


def _refusal(path: Path, error: Exception) -> str:
    what = stranger(path)
    if what is not None and not _has_header(path):
        return f"{path} is truncated, damaged or not safetensors: it is {what}"
    cause = _short(path) or str(error)
    return f"{path} is truncated, damaged or not safetensors: {cause}; fetch it again"


def _has_header(path: Path) -> bool:
    """Whether a length and a brace are where safetensors has them: the length's bytes may look like
    anything."""
    with path.open("rb") as f:
        head = f.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32


def _short(path: Path) -> str | None:
    """How much of the file is missing, or that its header is no JSON; None where neither is so."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            if length > _MOST:
                return "its first bytes are not the length of a header"
            if 8 + length > size:
                return f"it has {size} bytes, fewer than its header needs ({8 + length})"
            header = json.loads(f.read(length))
        ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
    except (OSError, struct.error):
        return None
    except (ValueError, RecursionError):
        return "its header is not JSON"
    except (AttributeError, KeyError, TypeError, IndexError):
        return None
    if size < whole:
        return f"it has {size} of {whole} bytes: a download or a copy stopped"
    return None
