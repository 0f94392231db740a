"""Sizes as people write them: ``8GB``, ``1.5 GiB``, ``800M``, or plain bytes."""

from __future__ import annotations

from llmquant.errors import UsageError


def parse_size(option: str, text: str, least: int = 0) -> int:
    """Bytes, at least ``least`` of them.

    Raises:
        UsageError: not a size, or too small a one; names the option.
    """
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        size = TypeAdapter(ByteSize).validate_python(text)
    except ValidationError as e:
        raise UsageError(
            f"{option} {text!r} is not a size; write bytes, or a number with KB, MB, GB, TB, KiB, MiB, GiB or TiB"
        ) from e
    if size < least:
        raise UsageError(f"{option} {text} holds no model; give a size such as 8GiB")
    return size


def check_shard_size(nbytes: int) -> None:
    """Raises UsageError for shards of less than a megabyte: most likely another unit was meant."""
    if nbytes < 1_000_000:
        raise UsageError(f"--max-shard-size {nbytes} is in bytes and must be at least 1000000")
