"""convert: the same numbers in another byte layout, or a refusal that names every module that does
not fit and why.

Lossless means: codes, scales, zero-points and groups of every module are equal after the result was
read back from disk, hence its dequantized weights too; every other tensor is the same bytes.
``dense`` gives an ordinary checkpoint of the weights that an engine would multiply by at its dtype.

Two passes over the source, one module in memory at a time: the first finds every refusal
(:mod:`.check`), the second writes. The folder gets its name after it has been compared with the
source (:mod:`.proof`).

Shards stay divided as the source's are (but for ``dense``, which is several times larger), so that
there and back again gives the same files, byte for byte.
"""

from __future__ import annotations

from llmquant.conversion.check import TARGETS
from llmquant.conversion.run import ConvertOptions, ConvertResult, convert

__all__ = ["TARGETS", "ConvertOptions", "ConvertResult", "convert"]
