"""PackedEmbedding: an ``nn.Embedding`` whose rows stay packed until they are looked up.

Its rows are a :class:`~llmquant.kernels.packed_linear.PackedLinear`, which is also the tied head
where there is one: the same module in two places, so there is one copy in memory, also after a
move.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmquant.kernels.packed_linear import PackedLinear


class PackedEmbedding(nn.Module):
    """Looks rows up in a packed ``[tokens, width]`` matrix.

    Args:
        table: the matrix; without a bias.
        scale: what the rows are multiplied by.
    """

    def __init__(self, table: PackedLinear, scale: float = 1.0) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.shape
        self.table, self.scale = table, scale

    def forward(self, ids: Tensor) -> Tensor:
        """Integers ``[...]`` → ``[..., width]`` in the table's dtype.

        Raises:
            IndexError: an id that is no row.
        """
        if not torch.compiler.is_compiling() and ids.numel():
            least, most = (int(n) for n in torch.aminmax(ids))
            if least < 0 or most >= self.num_embeddings:
                raise IndexError(
                    f"token ids {least} … {most} for embeddings of {self.num_embeddings} tokens"
                )
        rows = self.table.rows(ids.reshape(-1).to(torch.int64)).view(*ids.shape, self.embedding_dim)
        if self.scale == 1.0:
            return rows
        return rows * torch.tensor(self.scale, dtype=rows.dtype, device=rows.device)

    @property
    def weight(self) -> Tensor:
        """``[tokens, width]`` in the table's dtype, decoded where its numbers are used."""
        return self.table.weight

    def extra_repr(self) -> str:
        scaled = "" if self.scale == 1.0 else f", scale={self.scale:g}"
        return f"{self.num_embeddings}, {self.embedding_dim}{scaled}"
