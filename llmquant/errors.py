"""Every error a user can meet, in one tree.

    LlmquantError                 exit 1: the work failed
      UsageError                  exit 2: the request cannot be right as written
        SpecError                 a number format that cannot exist (bits, group size)
        RecipeError               a recipe or override that does not parse or contradicts itself
        SourceError               a text source that cannot be read or has nothing in it
      CheckpointError             a model folder that is incomplete, unsafe or damaged
        UnfitModelError           exit 2: no model, or not of the kind that the command needs
        DiskError                 something could not be written: a full or failing disk
      ArchitectureError           exit 2: a model whose blocks or linears we cannot find
      QuantizationError           the arithmetic failed: NaN, Inf, nothing quantized
      ParallelError               another process of the same run failed or cannot be reached
      FormatError                 numbers that a file layout cannot hold, or bytes it cannot mean
        LayoutError               exit 2: a layout that cannot hold what was asked for
      ProofError                  what lies on disk is not what the algorithm returned

A message says what went wrong, which object it was, and what to do next. Nothing here imports
torch: the command line must be able to report an error before it has paid for that import.
"""

from __future__ import annotations


class LlmquantError(Exception):
    """Base of all errors raised on purpose. ``exit_code`` is what the command line returns."""

    exit_code = 1


class UsageError(LlmquantError):
    """The caller asked for something that cannot be done as written."""

    exit_code = 2


class SpecError(UsageError, ValueError):
    """A quantization spec that is impossible in itself or for a given weight shape."""


class RecipeError(UsageError, ValueError):
    """A recipe that cannot be read or that contradicts itself."""


class SourceError(UsageError):
    """A text source (``hf:``, ``file:``, ``jsonl:``) that cannot be read, or that yields
    nothing."""


class CheckpointError(LlmquantError):
    """A checkpoint folder that is incomplete, unsafe or damaged."""


class UnfitModelError(CheckpointError):
    """What was named is no model, or none of the kind that the command needs: nothing is damaged,
    another request is right."""

    exit_code = UsageError.exit_code


class DiskError(CheckpointError):
    """The disk refused what was to be written. ``full``: for want of space."""

    def __init__(self, message: str, *, full: bool = False) -> None:
        super().__init__(message)
        self.full = full


class ArchitectureError(LlmquantError):
    """The model's decoder blocks or linears could not be located."""

    exit_code = UsageError.exit_code


class QuantizationError(LlmquantError):
    """Quantization produced, or was given, numbers that cannot be right."""


class ParallelError(LlmquantError):
    """Another process of the same run failed or cannot be reached."""


class FormatError(LlmquantError):
    """A file layout cannot hold these numbers, or these bytes cannot be read as one."""

    def at(self, where: str) -> FormatError:
        """The same refusal with its place before it."""
        return type(self)(f"{where}: {self}")


class LayoutError(FormatError):
    """A file layout that cannot hold what was asked for, or is not one that llmquant reads: another
    layout is right."""

    exit_code = UsageError.exit_code


class ProofError(LlmquantError):
    """Bytes on disk disagree with what the algorithm returned or with the manifest."""
