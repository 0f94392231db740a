"""A checkpoint seen rotated: the same function in other coordinates, in which weights and
activations have fewer outliers.

QuaRot and SpinQuant (arXiv:2404.00456, 2405.16406), as far as it can be folded into weights, so
that no engine needs to know. With row vectors ``x`` and orthogonal ``Q``:

* The residual stream becomes ``x Q``: embeddings ``E Q``, linears that write to it ``Q^T W`` and
  ``b Q``, linears that read it ``W diag(n) Q`` with the weight ``n`` of the norm before them, which
  becomes 1. An RMSNorm without weights commutes with every ``Q``, a LayerNorm with those that keep
  the mean, so there ``Q`` leaves ``(1, …, 1)`` where it is; a norm's bias ``b`` becomes ``(b / n)
  Q``.
* The head reads the residual stream too. Where it shares its weights with the embeddings it gets
  its own: one is multiplied by the last norm's weight and the other is not.
* Inside attention every value head becomes ``v R``, with one ``R`` for all, undone by the columns
  of the output projection that read it. Probabilities mix positions, not channels, so ``R`` passes
  through, shared key-value heads included.

Queries and keys are not rotated: rotary embeddings and norms stand between them. Norms on the
*outputs* of attention and MLP (Gemma 2 and 3) scale channels of the rotated stream and cannot be
absorbed: refused.

:class:`RotatedReader` does this tensor by tensor as it is read, in float64, rounded once to the
checkpoint's dtype. Whoever reads through it (calibration, rounding, copying, proof) sees one model,
and never more of it in memory than before.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from llmquant.algorithms.hadamard import Rotation, hadamard_rotation, random_rotation
from llmquant.checkpoint.reader import CheckpointReader, ReaderView
from llmquant.errors import ArchitectureError, SpecError
from llmquant.models.architectures import ARCHITECTURES
from llmquant.models.rotation.roles import ROLES
from llmquant.recipe import Recipe
from llmquant.recipe_sections import Rotation as Wanted
from llmquant.records import RotationRecord
from llmquant.runtime.finite import some

Change = Callable[[Tensor], Tensor]

_HEAD = "lm_head"
_ROWS = 4096
_KINDS = {"hadamard": hadamard_rotation, "random": random_rotation}
# Per head, or computed: in no coordinates of the residual stream.
_UNTOUCHED = re.compile(r"\.(q_norm|k_norm)\.weight$|rotary_emb\.inv_freq$")


def rotated(reader: CheckpointReader, recipe: Recipe) -> CheckpointReader:
    """The checkpoint as the recipe wants it seen; the same reader where it wants no rotation. No
    weight is read.

    Raises:
        ArchitectureError: a model that cannot be rotated, or is not known well enough.
        SpecError: no Hadamard matrix of a width is known.
    """
    return reader if recipe.rotation is None else RotatedReader(reader, recipe.rotation)


def growth(seen: CheckpointReader, stored: CheckpointReader, recipe: Recipe) -> tuple[str, ...]:
    """What people should know of the folder's size: a head that was tied. Nothing where the recipe
    packs the embeddings.

    Args:
        seen: from :func:`rotated`.
        stored: the same in the dtype that is stored.
    """
    if not isinstance(seen, RotatedReader) or not seen.report.untied or recipe.embeddings:
        return ()
    size = stored.info(f"{_HEAD}.weight").nbytes / 1e6
    return (
        f"rotation: the head is tied to the embeddings, and becomes a tensor of its own: {size:,.2f} MB more where it is not "
        "packed (--embeddings 8 packs both)",
    )


class RotatedReader(ReaderView):
    """A :class:`CheckpointReader` that gives rotated tensors, and a head of its own where it was
    tied.

    Args:
        reader: the original.
        wanted: the recipe's section.

    Attributes:
        report: what is rotated.

    Raises:
        ArchitectureError, SpecError: as :func:`rotated`.
    """

    def __init__(self, reader: CheckpointReader, wanted: Wanted) -> None:
        super().__init__(reader)
        self.tensors = dict(reader.tensors)
        self.config = dict(reader.config)
        self._kind = str(self.config.get("model_type"))
        if self._kind not in ROLES:
            raise ArchitectureError(
                f"rotation is not known for model type {self._kind!r}, only for {', '.join(ROLES)}"
            )
        self._roles, self._architecture = ROLES[self._kind], ARCHITECTURES[self._kind]
        self._changes: dict[str, list[Change]] = defaultdict(list)
        self._source: dict[
            str, str
        ] = {}  # a tensor that the folder has not → the one it is made of
        # As long as the vocabulary, and changed row by row: a float64 copy of one would outgrow a
        # block.
        self._by_rows = {f"{m}.weight" for m in (*self._roles.embeddings, _HEAD)}
        norms, untied, residual, heads = 0, False, None, None
        if wanted.residual != "off":
            self._refuse_residual()
            untied = self._untie()
            width = self.info(f"{self._roles.embeddings[0]}.weight").shape[1]
            residual = self._matrix(
                wanted.residual, width, wanted.seed, self._roles.layer_norm, "hidden_size"
            )
            norms = self._rotate_residual(residual)
        if wanted.heads:
            kind = "hadamard" if wanted.residual == "off" else wanted.residual
            count, width = self._heads()
            heads = self._matrix(kind, width, wanted.seed + 1, False, "head_dim")
            self._rotate_heads(heads, count)
        self.report = RotationRecord(
            residual=_name(residual),
            heads=_name(heads),
            seed=wanted.seed,
            norms=norms,
            untied=untied,
        )

    def read(self, name: str) -> Tensor:
        """One tensor, rotated in float64 and rounded once to the dtype it is stored in."""
        tensor = super().read(self._source.get(name, name))
        if name not in self._changes:
            return tensor
        if name not in self._by_rows:
            return self._changed(name, tensor).contiguous()
        result = torch.empty_like(tensor)
        for start in range(0, tensor.shape[0], _ROWS):
            result[start : start + _ROWS] = self._changed(name, tensor[start : start + _ROWS])
        return result

    def _changed(self, name: str, tensor: Tensor) -> Tensor:
        value = tensor.to(torch.float64)
        for change in self._changes[name]:
            value = change(value)
        return value.to(tensor.dtype)

    def _refuse_residual(self) -> None:
        reasons = [
            f"config.json has {k}: {self.config[k]}"
            for k, v in self._roles.needs
            if self.config.get(k, v) != v
        ]
        if self._roles.why_not is not None or reasons:
            raise ArchitectureError(
                f"the residual stream of model type {self._kind!r} cannot be rotated: {self._roles.why_not or reasons[0]}; "
                "rotation.residual: off rotates the heads alone"
            )

    def _matrix(self, kind: str, size: int, seed: int, keep_mean: bool, what: str) -> Rotation:
        try:
            return _KINDS[kind](size, seed, keep_mean)
        except SpecError as e:
            raise SpecError(f"rotation of {what} {size}: {e}") from e

    def _untie(self) -> bool:
        """Give the head a tensor of its own where it shares the embeddings'; whether it did."""
        head, embeddings = f"{_HEAD}.weight", f"{self._roles.embeddings[0]}.weight"
        if head in self.tensors and not self.config.get("tie_word_embeddings"):
            return False
        self.tensors[head] = self.info(embeddings)
        self._source[head] = embeddings
        self.config["tie_word_embeddings"] = False
        return True

    def _rotate_residual(self, matrix: Rotation) -> int:
        """Note what happens to every tensor that is in the residual stream's coordinates; the
        number of norms."""
        roles = self._roles
        last = f"{self._architecture.norm}.weight"
        for module in roles.embeddings:
            self._changes[f"{module}.weight"].append(matrix.apply)
        self._changes[f"{_HEAD}.weight"].append(self._absorbing(last, matrix))
        norms = self._absorb(last, matrix)
        readers = {reader: norm for norm, members in roles.norms.items() for reader in members}
        unknown = []
        for name in self.tensors:
            place = re.fullmatch(
                rf"({re.escape(self._architecture.blocks)}\.\d+)\.(.+)\.(weight|bias)", name
            )
            if place is None:
                if name not in self._changes and not _UNTOUCHED.search(name):
                    unknown.append(name)
                continue
            block, module, leaf = place.groups()
            module = re.sub(r"\.\d+\.", ".*.", module)
            if module in roles.norms:
                norms += self._absorb(name, matrix) if leaf == "weight" else 0
            elif module in readers:
                if leaf == "weight":
                    self._changes[name].append(
                        self._absorbing(f"{block}.{readers[module]}.weight", matrix)
                    )
            elif module in roles.writers:
                self._changes[name].append(
                    matrix.apply_to_rows if leaf == "weight" else matrix.apply
                )
            elif not _UNTOUCHED.search(name):
                unknown.append(name)
        if unknown:
            raise ArchitectureError(
                f"{self.path}: llmquant does not know how {some(sorted(unknown))} use the residual stream of model type "
                f"{self._kind!r}, so it cannot be rotated; rotation.residual: off rotates the heads alone"
            )
        return norms

    def _absorb(self, norm: str, matrix: Rotation) -> int:
        """A norm whose weight goes into what reads it, and whose bias, if any, is kept in the new
        coordinates; counts one."""
        bias = f"{norm.removesuffix('weight')}bias"
        self._changes[norm].append(torch.ones_like)
        if bias in self.tensors:
            if bool((super().read(norm) == 0).any()):
                raise ArchitectureError(
                    f"{self.path}: {norm} has channels of weight 0, whose biases cannot be moved into a rotated residual "
                    "stream; rotation.residual: off rotates the heads alone"
                )
            self._changes[bias].append(lambda b: matrix.apply(b / self._original(norm)))
        return 1

    def _absorbing(self, norm: str, matrix: Rotation) -> Change:
        """``W diag(n) Q`` with the norm's original weight."""
        return lambda weight: matrix.apply(weight * self._original(norm))

    def _original(self, name: str) -> Tensor:
        return super().read(name).to(torch.float64)

    def _heads(self) -> tuple[int, int]:
        """Key-value heads and the width of each.

        Raises:
            ArchitectureError: the values' linear has another number of rows than the config says.
        """
        queries = int(self.config["num_attention_heads"])
        count = int(self.config.get("num_key_value_heads") or queries)
        width = int(self.config.get("head_dim") or int(self.config["hidden_size"]) // queries)
        for name, info in self.tensors.items():
            rows = info.shape[0]
            if name.endswith(f".{self._roles.values}.weight") and rows not in (
                count * width,
                (queries + 2 * count) * width,
            ):
                raise ArchitectureError(
                    f"{self.path}: {name} has {rows} rows, and config.json has {count} key-value heads of {width}; "
                    "rotation.heads: false leaves them alone"
                )
        return count, width

    def _rotate_heads(self, matrix: Rotation, count: int) -> None:
        """Note what happens to values and what reads them."""
        blocks = re.escape(self._architecture.blocks)
        values, output = (re.escape(m) for m in (self._roles.values, self._roles.output))

        def rotate_values(tensor: Tensor) -> Tensor:
            rows = (
                count * matrix.size
            )  # the last ones, where queries and keys stand before them in one matrix
            heads = tensor[-rows:].reshape(count, matrix.size, -1).transpose(1, 2)
            own = matrix.apply(heads).transpose(1, 2).reshape(tensor[-rows:].shape)
            return torch.cat([tensor[:-rows], own])

        def rotate_columns(weight: Tensor) -> Tensor:
            return matrix.apply(weight.reshape(weight.shape[0], -1, matrix.size)).reshape(
                weight.shape
            )

        for name in self.tensors:
            if re.fullmatch(rf"{blocks}\.\d+\.{values}\.(weight|bias)", name):
                self._changes[name].append(rotate_values)
            elif re.fullmatch(rf"{blocks}\.\d+\.{output}\.weight", name):
                self._changes[name].append(rotate_columns)


def _name(matrix: Rotation | None) -> str | None:
    return None if matrix is None else matrix.name
