"""Records of an ``hf:`` source: a dataset of the Hugging Face hub, or a local folder, through the
``datasets`` library.

Two ways lead to the same rows. *Prepared* downloads the whole dataset once and caches it, which is
right for WikiText; *streamed* fetches only what is read, which is right for C4 and its 300 GB. A
dataset is streamed if it is a local folder (no second copy in the cache), or if it is larger than
``PREPARE_BYTES`` or of unknown size; never when offline, where only the cache can answer. Streaming
knows no slices, so ``split[A:B]`` by row numbers is cut here; slices by percent or from the end
need the whole dataset.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub.errors import HfHubHTTPError

from llmquant.errors import SourceError

PREPARE_BYTES = 2 << 30
_BY_ROWS = re.compile(r"([^\[+]+)(?:\[(\d*):(\d*)\])?")
# What datasets, pyarrow and the hub client raise for a name, network, config, split or file that is
# wrong. The client's transport errors derive from the HTTP library's base, which differs by its
# version; its own error derives from it too.
_FAILURES = (
    OSError,
    ValueError,
    RuntimeError,
    datasets.exceptions.DatasetsError,
    *HfHubHTTPError.__bases__,
)


def hf_records(
    name: str, config: str | None, split: str, fields: Sequence[str], beside: str
) -> Iterator[object]:
    """The records of a dataset's split, one dict a row.

    Args:
        fields: the first of these that the dataset has is read; the others are left out where that
            saves decoding.
        beside: is read too where there is one.

    Raises:
        SourceError: unknown name, config, split or field, no network, a file that does not parse;
            says what there is.
    """
    source = f"hf:{name}:{config or ''}:{split}"
    try:
        table = _open(source, name, config, split)
        columns = table.column_names
        if columns is not None:
            wanted = next((field for field in fields if field in columns), None)
            if wanted is None:
                raise SourceError(
                    f"{source} has no field {_either(fields)}; its fields: {', '.join(columns)}"
                )
            table = table.select_columns([c for c in columns if c in (wanted, beside)])
        yield from table
    except _FAILURES as e:
        raise SourceError(
            f"{source} cannot be read: {_root(e)}. Check the name, the config, the split and the network, "
            "or use a local copy: hf:FOLDER:SPLIT, file:PATH or jsonl:PATH#FIELD"
        ) from e


def _open(source: str, name: str, config: str | None, split: str) -> Any:
    """A ``Dataset`` or ``IterableDataset`` of the split."""
    builder = datasets.load_dataset_builder(name, config)
    by_rows = _BY_ROWS.fullmatch(split)
    size = builder.info.dataset_size or builder.info.download_size
    local = Path(name).is_dir()
    costly = (
        (size is None or size > PREPARE_BYTES) and not local and not datasets.config.HF_HUB_OFFLINE
    )
    if by_rows and (local or costly):
        return _stream(builder, by_rows[1], int(by_rows[2] or 0), by_rows[3])
    if costly:
        much = "whose size is unknown" if size is None else f"of {size / 2**30:.0f} GiB"
        raise SourceError(
            f"{source}: this slice needs the whole dataset, {much}; give row numbers, as in train[:10000]"
        )
    builder.download_and_prepare()
    return builder.as_dataset(split)


def _stream(builder: Any, split: str, start: int, stop: str | None) -> Any:
    """Rows ``start`` to ``stop`` (exclusive; to the end if empty) of a split."""
    stream = builder.as_streaming_dataset(split)
    if stop:
        stream = stream.take(int(stop))
    return stream.skip(start) if start else stream


def _either(fields: Sequence[str]) -> str:
    return " or ".join(map(repr, fields))


def _root(error: BaseException) -> str:
    """The innermost cause: ``datasets`` wraps what it met in "An error occurred while generating
    the dataset"."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
