"""What transformers raises over files that make no sense: whatever exception the first computation
on them happens to raise. ``CONFUSED`` lists what was met; whoever calls it makes errors of them
that name the file.
"""

from __future__ import annotations

from huggingface_hub.errors import StrictDataclassError

CONFUSED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
_LONGEST = 400


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its kind where it says nothing or only a key."""
    said = " ".join(line.strip() for line in str(error).splitlines()[:2]) or "no reason given"
    said = said.partition(" Model type should be one of ")[0]  # 3 KB of class names
    said = said if len(said) <= _LONGEST else f"{said[:_LONGEST]} …"
    plain = isinstance(error, (ImportError, OSError, StrictDataclassError, ValueError))
    return said if plain else f"{said} ({type(error).__name__})"
