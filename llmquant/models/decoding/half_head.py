"""A head, and an embedding that is tied to it, kept in the 16 bits that the checkpoint has them in
and computed with in float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmquant.kernels import native
from llmquant.models.naming.names import put_head


class HalfLinear(nn.Module):
    """A linear whose weight is kept as the 16-bit numbers that the checkpoint has, multiplied in
    float32: exact, half the memory.

    Args:
        weight: ``[out, in]``, float32 whose values are exact in ``stored``.
        stored: bfloat16 or float16.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, stored: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("words", native.half_tiles(weight, stored))
        self.bias = bias if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` → ``[..., out]``."""
        words: Tensor = self.words  # type: ignore[assignment]
        if torch.is_grad_enabled() and x.requires_grad:
            y = nn.functional.linear(x, native.half_weight(words, self.out_features).to(x.dtype))
        else:
            y = native.half_linear(x, words, self.out_features, self.in_features)
        return y if self.bias is None else y + self.bias

    @property
    def weight(self) -> Tensor:
        """``[out, in]`` float32, made anew."""
        words: Tensor = self.words  # type: ignore[assignment]
        return native.half_weight(words, self.out_features).float()

    def extra_repr(self) -> str:
        stored = str(self.words.dtype).removeprefix("torch.")
        return f"in_features={self.in_features}, out_features={self.out_features}, stored={stored}"


class HalfEmbedding(nn.Module):
    """The embedding that is tied to a :class:`HalfLinear`: looks its rows up in the same tensor.

    Args:
        dtype: of the vectors it gives.
    """

    def __init__(self, head: HalfLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.dtype = (
            head.out_features,
            head.in_features,
            dtype,
        )
        words: Tensor = head.words  # type: ignore[assignment]
        self.register_buffer("words", words)

    def forward(self, ids: Tensor) -> Tensor:
        """Integers ``[...]`` → ``[..., width]``."""
        words: Tensor = self.words  # type: ignore[assignment]
        return words[ids // native.ROWS, :, ids % native.ROWS].to(self.dtype)

    @property
    def weight(self) -> Tensor:
        """``[vocabulary, width]`` of ``dtype``, made anew."""
        words: Tensor = self.words  # type: ignore[assignment]
        return native.half_weight(words, self.num_embeddings).to(self.dtype)


def halve_head(model: PreTrainedModel) -> None:
    """Keep a float32 head, and an embedding that is tied to it, as the 16-bit numbers that they
    were read as."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if type(head) is not nn.Linear or head.weight.dtype is not torch.float32:
        return
    stored = next(
        (
            d
            for d in (torch.bfloat16, torch.float16)
            if torch.equal(head.weight.to(d).float(), head.weight)
        ),
        None,
    )
    tied = head.weight is getattr(embedding, "weight", None)
    if stored is None or (tied and type(embedding) is not nn.Embedding):
        return
    halved = HalfLinear(head.weight.detach(), head.bias, stored)
    model.config.tie_word_embeddings = (
        False  # neither has a parameter to share; what they share is a buffer
    )
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    put_head(model, halved)
    if tied:
        model.set_input_embeddings(HalfEmbedding(halved, torch.float32))
