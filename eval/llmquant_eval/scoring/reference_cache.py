"""The reference's log-probabilities on disk, so that it runs once however many candidates follow.

A cache is a folder named by the sha256 of what determines it: weights, tokenizer, token ids,
windows, dtype, kernel, form. Windows lie in safetensors shards whose hashes stand in
``cache.json``, which is written last and whole: a folder without it is unfinished, and the next
run keeps the shards that its ``shards.json`` lists. A shard of a finished cache that is missing,
short or changed is an error that names it. Nothing is pickled.

A compact form changes the KL by something. So the cache also keeps, at positions spread evenly over
the text, the full distribution in float32; every candidate is compared with both there, and its
report says how far the compact KL was from the exact one
(:class:`llmquant_eval.report.schema.CompactKlShift`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llmquant import replace_file
from llmquant.errors import CheckpointError, UsageError
from llmquant_eval.report.results import CompactKlShift
from llmquant_eval.scoring.cache_forms import (
    Form,
    Full16,
    StoredWindow,
    Top,
    exact_arrays,
    parse_form,
)
from llmquant_eval.scoring.divergence import token_divergence

if TYPE_CHECKING:
    from torch import Tensor

    from llmquant_eval.scoring.token_stream import TokenStream

INDEX = "cache.json"
_WRITTEN = "shards.json"  # of an unfinished cache
_VERSION = 1
_SHARD_BYTES = 64 << 20
_SAMPLE_BYTES, _MOST_SAMPLES, _FEWEST_SAMPLES = 64 << 20, 256, 16
_FULL_LIMIT = 4 << 30  # bytes up to which the whole vocabulary is kept by default
_DEFAULT_TOP = 512


class _Shard(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    file: str
    sha256: str
    windows: list[int]


_SHARDS = TypeAdapter(list[_Shard])


class _Index(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    key: dict[str, str | int]
    vocabulary: int
    kernels: dict[str, int]
    samples: dict[int, list[int]]
    shards: list[_Shard]


@dataclass(frozen=True, slots=True)
class CacheKey:
    """What determines the numbers. ``ids_sha256`` is over the token stream and its windows."""

    weights_sha256: str
    tokenizer_sha256: str
    ids_sha256: str
    protocol: str
    dtype: str
    device: str
    kernel: str
    form: str
    version: int = _VERSION

    @property
    def name(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]


def choose_form(asked: str | None, positions: int, vocabulary: int) -> Form:
    """The form asked for; by default the whole vocabulary up to 4 GiB in all, else the 512 most
    likely tokens."""
    if asked is not None:
        return parse_form(asked)
    return (
        Full16()
        if positions * Full16().bytes_per_position(vocabulary) <= _FULL_LIMIT
        else Top(_DEFAULT_TOP)
    )


def sample_positions(stream: TokenStream, vocabulary: int) -> dict[int, list[int]]:
    """Window number → positions in it at which the exact distribution is kept.

    They are spread evenly over all scored tokens.
    """
    layout = stream.layout
    wanted = min(
        layout.tokens, _MOST_SAMPLES, max(_FEWEST_SAMPLES, _SAMPLE_BYTES // (4 * vocabulary))
    )
    picked: dict[int, list[int]] = {}
    for flat in np.linspace(0, layout.tokens - 1, wanted).astype(int):
        window = int(np.searchsorted(layout.starts, flat, side="right")) - 1
        picked.setdefault(window, []).append(int(flat - layout.starts[window]))
    return picked


class CacheWriter:
    """Takes windows in any order, writes shards, and the index last.

    Attributes:
        there: windows that a run which was stopped has written.
    """

    def __init__(self, folder: Path, key: CacheKey, stream: TokenStream, vocabulary: int) -> None:
        self._folder, self._key, self._vocabulary = folder, key, vocabulary
        self._form = parse_form(key.form)
        self._samples = sample_positions(stream, vocabulary)
        self._held: dict[str, NDArray[np.generic]] = {}
        self._windows: list[int] = []
        self._shards = _shards_of(folder)
        self.there = frozenset(i for shard in self._shards for i in shard.windows)
        try:
            if folder.exists() and not self._shards:
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UsageError(f"--cache {folder.parent} cannot be written: {e}") from e

    def add(self, window: int, logits: Tensor, targets: Tensor) -> None:
        """Keep window number ``window``: logits ``[positions, vocabulary]``, targets int64
        ``[positions]``."""
        arrays = exact_arrays(logits, targets) | self._form.encode(logits)
        if window in self._samples:
            rows = logits[self._samples[window]]
            arrays["exact"] = torch.log_softmax(rows, dim=-1, dtype=torch.float32).cpu().numpy()
        self._held |= {f"{window}.{name}": array for name, array in arrays.items()}
        self._windows.append(window)
        if sum(a.nbytes for a in self._held.values()) >= _SHARD_BYTES:
            self._flush()

    def _flush(self) -> None:
        name = f"{len(self._shards):05d}.safetensors"
        try:
            save_file(self._held, self._folder / name)
            self._shards.append(
                _Shard(file=name, sha256=_sha256(self._folder / name), windows=self._windows)
            )
            replace_file(self._folder / _WRITTEN, _SHARDS.dump_json(self._shards).decode())
        except (OSError, SafetensorError) as e:  # safetensors wraps a full disk
            raise self._unwritable(name, e) from e
        self._held, self._windows = {}, []

    def finish(self, kernels: Mapping[str, int]) -> None:
        """Write the last shard, then the index, which makes the cache valid."""
        if self._held:
            self._flush()
        index = _Index(
            key=asdict(self._key),
            vocabulary=self._vocabulary,
            kernels=dict(kernels),
            samples=self._samples,
            shards=self._shards,
        )
        try:
            replace_file(self._folder / INDEX, index.model_dump_json(indent=1) + "\n")
            (self._folder / _WRITTEN).unlink(missing_ok=True)
        except OSError as e:
            raise self._unwritable(INDEX, e) from e

    def _unwritable(self, name: str, why: Exception) -> UsageError:
        return UsageError(f"--cache {self._folder.parent}: {name} cannot be written: {why}")


def _shards_of(folder: Path) -> list[_Shard]:
    """What a run that was stopped wrote; nothing where a shard is missing or changed."""
    try:
        shards = _SHARDS.validate_json((folder / _WRITTEN).read_bytes())
        whole = [_sha256(folder / shard.file) == shard.sha256 for shard in shards]
    except (OSError, ValidationError):
        return []
    return shards if all(whole) else []


class CachedReference:
    """A finished cache, read a window at a time; each shard's hash is checked when it is first
    touched.

    Raises:
        CheckpointError: on construction or reading, for an index or shard that is damaged; says
            which, and to delete it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._index = _Index.model_validate_json((folder / INDEX).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValidationError) as e:
            raise self._damaged(INDEX, str(e).splitlines()[0]) from e
        self._home = {w: shard for shard in self._index.shards for w in shard.windows}
        self._checked: set[str] = set()

    @property
    def vocabulary(self) -> int:
        return self._index.vocabulary

    @property
    def kernels(self) -> dict[str, int]:
        """Kernels that the reference multiplied with."""
        return self._index.kernels

    @property
    def form(self) -> str:
        return str(self._index.key["form"])

    def window(self, number: int) -> StoredWindow:
        """The reference at the scored positions of one window."""
        return parse_form(self.form).window(self._arrays(number), self.vocabulary)

    def errors(self, number: int, candidate: Tensor, targets: Tensor) -> NDArray[np.float64]:
        """Compact minus exact KL of a candidate at this window's sample positions; empty where it
        has none."""
        rows = self._index.samples.get(number, [])
        if not rows:
            return np.empty(0)
        exact = torch.from_numpy(self._arrays(number)["exact"].astype(np.float32)).to(
            candidate.device
        )
        arrays = {
            name: array[rows] for name, array in self._arrays(number).items() if name != "exact"
        }
        compact = (
            parse_form(self.form)
            .window(arrays, self.vocabulary)
            .divergence(candidate[rows], targets[rows])
        )
        wanted = token_divergence(exact, candidate[rows], targets[rows])
        difference: NDArray[np.float64] = (compact.kl.double() - wanted.kl.double()).cpu().numpy()
        return difference[np.isfinite(difference)]

    def _arrays(self, number: int) -> dict[str, NDArray[np.generic]]:
        shard = self._home.get(number)
        if shard is None:
            raise self._damaged(INDEX, f"window {number} is not in it")
        path = self.folder / shard.file
        try:
            if shard.file not in self._checked and _sha256(path) != shard.sha256:
                raise self._damaged(shard.file, "its sha256 is not the one that was written")
            self._checked.add(shard.file)
            with safe_open(path, framework="np") as tensors:
                mine = [name for name in tensors.keys() if name.startswith(f"{number}.")]  # noqa: SIM118
                return {name.partition(".")[2]: tensors.get_tensor(name) for name in mine}
        except (OSError, SafetensorError) as e:
            raise self._damaged(shard.file, str(e)) from e

    def _damaged(self, file: str, why: str) -> CheckpointError:
        return CheckpointError(
            f"the cached reference {self.folder} is damaged: {file}: {why}; delete that folder to have it made again"
        )


def compact_kl_shift(
    errors: NDArray[np.float64], protocol: str, form: str
) -> CompactKlShift | None:
    """What a report says of differences ``[positions]``; None where nothing could be compared."""
    if not len(errors):
        return None
    return CompactKlShift(
        protocol=protocol,
        form=form,
        positions=len(errors),
        mean=float(errors.mean()),
        largest=float(abs(errors).max()),
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
