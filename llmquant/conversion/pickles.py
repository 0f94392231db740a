"""``llmquant import`` of a folder of pickles: the same tensors as safetensors in another folder.

No model is built, so nothing is made up and nothing left out: names, dtypes and numbers are those
of the pickles, whatever config.json says of them, and a tensor that they lack is lacking afterwards
too, for the checks of safetensors folders to name. torch reads a pickle as tensors alone
(``weights_only``), and refuses one that holds anything else: no code in it runs.

The files are those that transformers would read: ``pytorch_model.bin``, else the shards of its
index, one shard for each; of a tensor that two of them hold, the later one's numbers. They are
mapped from the disk, so that no more than a tensor at a time need be in memory; those that torch
before 1.6 wrote cannot be, and are read one file at a time. torch stores a checksum of every tensor
and does not look at it when it reads; here it is looked at, so that a damaged copy is not "proved".
"""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from llmquant.checkpoint.atomic import check_destination, refuse_held
from llmquant.checkpoint.companions.confusion import CONFUSED, first_line
from llmquant.checkpoint.companions.files import DESCRIBING, companions, files_read, left_behind
from llmquant.checkpoint.gguf.folder import ImportResult, OnProgress
from llmquant.checkpoint.reader import CheckpointReader, sha256_tensor
from llmquant.checkpoint.shards import DTYPE_NAMES
from llmquant.checkpoint.weights.files import pickle_files, pickle_index, refuse_adapter
from llmquant.checkpoint.weights.headers import PICKLED, stranger
from llmquant.checkpoint.weights.json_files import read_json
from llmquant.checkpoint.weights.proof import prove_weights
from llmquant.checkpoint.writer import CheckpointWriter
from llmquant.errors import CheckpointError, UnfitModelError
from llmquant.runtime.finite import some


@dataclass(slots=True)
class _Written:
    """What of the pickles is written: the sha256 of each tensor by its name, how many have which
    dtype, and how many numbers they hold."""

    digests: dict[str, str] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    numbers: int = 0


def import_pickles(
    source: Path,
    output: str | os.PathLike[str],
    *,
    max_shard_size: int = 5_000_000_000,
    overwrite: bool = False,
    on_progress: OnProgress = lambda phase, done, total: None,
) -> ImportResult:
    """Write a folder of pickles as one of safetensors.

    Args:
        source: the folder, which stays as it is.
        output: folder to make; appears whole, after its proof, or not at all.
        max_shard_size: bytes after which a shard of the pickles becomes two.
        overwrite: replace an existing model folder.
        on_progress: called with ``writing`` or ``proving``, tensors done, and all of them.

    Raises:
        UsageError: a destination that exists, or a folder that has safetensors.
        UnfitModelError: no pickles that transformers would read, or they hold more than tensors.
        CheckpointError: a pickle that torch refuses, or that is not what was saved.
        ProofError: what was written is not what was read.
    """
    destination = Path(os.path.abspath(output))
    check_destination(destination, overwrite)
    refuse_adapter(source)
    config = read_json(source / "config.json")
    files = pickle_files(source)
    owners, notes = _owners(files)
    refuse_held(destination, f"the model {source}", [source, *files_read(source, files)])
    with CheckpointWriter(
        destination, max_shard_size=max_shard_size, overwrite=overwrite
    ) as writer:
        written = _write(files, owners, writer, on_progress)
        writer.copy_side_files(source, also=DESCRIBING)
        prove_weights(CheckpointReader(writer.partial), written.digests, on_progress)
        writer.publish()
    return ImportResult(
        path=Path(output),
        model_type=str(config.get("model_type", "unknown")),
        dtype=", ".join(kind for kind, _ in written.kinds.most_common()),
        scheme=None,
        types=dict(written.kinds),
        tensors=len(written.digests),
        parameters=written.numbers,
        source_bytes=sum(file.stat().st_size for file in files),
        bytes_written=writer.total_bytes,
        notes=(*notes, *left_behind(companions(source, (*files, *pickle_index(source))))),
    )


def _owners(files: tuple[Path, ...]) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Tensor → the file whose numbers count, with what people should know; every file is looked
    into before anything is written."""
    owners: dict[str, Path] = {}
    twice: set[str] = set()
    for file in files:
        _refuse_damaged(file)
        names = _tensors(file).keys()
        twice |= owners.keys() & names
        owners |= dict.fromkeys(names, file)
    if not owners:
        raise CheckpointError(f"{files[0].parent} has pickle files without a single tensor")
    note = f"{some(sorted(twice))}: in more than one file; the last file's numbers count, as in transformers"
    return owners, (note,) if twice else ()


def _write(
    files: tuple[Path, ...],
    owners: Mapping[str, Path],
    writer: CheckpointWriter,
    on_progress: OnProgress,
) -> _Written:
    """Write the weights, a shard for every file."""
    written = _Written()
    for file in files:
        for name, tensor in _tensors(file).items():
            if owners[name] != file:
                continue
            on_progress("writing", len(written.digests), len(owners))
            written.digests[name] = sha256_tensor(tensor)
            writer.add(name, tensor)
            written.kinds[str(tensor.dtype).removeprefix("torch.")] += 1
            written.numbers += tensor.numel()
        writer.next_shard()
    writer.finish_weights()
    return written


def _tensors(file: Path) -> dict[str, Tensor]:
    """What a pickle holds, mapped from the file where its kind can be. Tensors that share their
    numbers are written as often as they are there.

    Raises:
        CheckpointError: torch refuses it: it holds code, or is damaged.
        UnfitModelError: it holds more than tensors by their names.
    """
    if (what := stranger(file, but=PICKLED)) is not None:
        raise CheckpointError(f"{file} is {what}")
    mapped = zipfile.is_zipfile(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of, it refuses or reads
            held = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except (*CONFUSED, EOFError, pickle.UnpicklingError) as e:
        raise CheckpointError(_refusal(file, e)) from e
    if not isinstance(held, Mapping):
        raise UnfitModelError(f"{file} holds {type(held).__name__}, not tensors by their names")
    strange = [f"{n} ({_kind(t)})" for n, t in held.items() if not _plain(n, t)]
    if strange:
        raise UnfitModelError(
            f"{file} holds more than what safetensors can, tensors by their names: {some(strange)}; "
            "save the model's state_dict() alone"
        )
    return {name: tensor.detach() for name, tensor in held.items()}


def _refuse_damaged(file: Path) -> None:
    """Raises CheckpointError for an archive of which a part is not what its checksum was made of.

    torch writes parts as they are, and 0 where it was told to leave checksums out
    (``set_crc32_options``).
    """
    if not zipfile.is_zipfile(file):
        return  # of torch before 1.6, which has no checksums, or damaged beyond reading
    try:
        with zipfile.ZipFile(file) as archive:
            for part in archive.infolist():
                if part.CRC and part.compress_type == zipfile.ZIP_STORED:
                    with archive.open(part) as f:
                        while f.read(1 << 20):
                            pass
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError) as e:
        raise CheckpointError(f"{file} is damaged ({first_line(e)}); fetch it again") from e


def _plain(name: object, value: object) -> bool:
    """Whether safetensors can hold it; it has a meaning of its own for one name."""
    return (
        isinstance(name, str)
        and name != "__metadata__"
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.dtype in DTYPE_NAMES
    )


def _kind(value: object) -> str:
    """What something in a pickle is, for people."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype}, {value.layout}, {value.device}".replace("torch.", "")


def _refusal(file: Path, error: BaseException) -> str:
    """Why torch refused a pickle. Around its reason torch puts advice to run the code."""
    reason = error.__context__ if isinstance(error, pickle.UnpicklingError) else None
    said = first_line(reason or error).partition(". ")[0].rstrip(".")
    return (
        f"{file} was not read: it holds something else than tensors, which may run code, or is damaged ({said}); "
        "look for a safetensors version of the model, or fetch it again"
    )
