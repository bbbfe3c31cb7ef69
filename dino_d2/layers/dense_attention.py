"""Attention to every token of the encoder, in place of a few points (DETR, section 3.2).

Positions are added to queries and keys (DenseAttention, of DETR), or content and position have
separate projections (ConditionalSelfAttention, ConditionalCrossAttention, of DAB-DETR, after
Conditional DETR, arXiv 2108.06152).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..structures import FeaturePyramid
from .blocks import xavier_uniform_


class DenseAttention(nn.MultiheadAttention):
    """Every query attends to every token that is not padding.

    Args:
        embed_dim: C, a multiple of `num_heads`
        num_heads: H
        dropout: probability, of the weights of attention
    """

    def __init__(self, *, embed_dim: int, num_heads: int, dropout: float = 0.0):
        super().__init__(embed_dim, num_heads, dropout, batch_first=True)
        xavier_uniform_(self)

    def forward(self, query: Tensor, memory: FeaturePyramid) -> Tensor:  # type: ignore[override]
        """Attend to the memory; maps queries (B, Q, C) to (B, Q, C)."""
        key = memory.tokens + memory.position
        padding = memory.padding
        return super().forward(query, key, memory.tokens, padding, need_weights=False)[0]

    def weights(self, query: Tensor, memory: FeaturePyramid) -> Tensor:
        """What each query attends to, (B, Q, S), a mean over heads; rows sum to 1."""
        key = memory.tokens + memory.position
        found: tuple[Tensor, Any] = super().forward(query, key, memory.tokens, memory.padding)
        return found[1]


class SelfAttention(nn.MultiheadAttention):
    """Self-attention of queries, whose positions are added to queries and keys.

    Computes what PyTorch's does, without copies of its inputs.

    Args:
        embed_dim, num_heads, dropout: as of :class:`DenseAttention`
    """

    def __init__(self, *, embed_dim: int, num_heads: int, dropout: float = 0.0):
        super().__init__(embed_dim, num_heads, dropout, batch_first=True)

    def forward(  # type: ignore[override]
        self, x: Tensor, position: Tensor, attn_mask: Tensor | None = None
    ) -> Tensor:
        """Content and position are (B, Q, C), as the result; `attn_mask` as of `DecoderLayer`."""
        dropout = self.training * self.dropout
        return self.out_proj(attend(*self.project(x, position, attn_mask), dropout))

    def weights(self, x: Tensor, position: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Whom each query attends to, (B, Q, Q), a mean over heads; rows sum to 1."""
        return mean_weights(*self.project(x, position, attn_mask))

    def project(
        self, x: Tensor, position: Tensor, attn_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Query, key and value of each head, (B, Q, H, .), and the mask as of PyTorch."""
        sizes = [2 * self.embed_dim, self.embed_dim]
        both, of_value = zip(
            self.in_proj_weight.split(sizes), self.in_proj_bias.split(sizes), strict=True
        )
        query, key = F.linear(x + position, *both).chunk(2, -1)
        value = F.linear(x, *of_value)
        query, key, value = (y.unflatten(-1, (self.num_heads, -1)) for y in (query, key, value))
        return query, key, value, allowed(attn_mask, self.num_heads)


class ConditionalSelfAttention(nn.Module):
    """Self-attention of queries, whose positions have separate projections.

    Args:
        embed_dim, num_heads, dropout: as of :class:`DenseAttention`
    """

    def __init__(self, *, embed_dim: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query_content, self.query_position, self.key_content, self.key_position = (
            nn.Linear(embed_dim, embed_dim) for _ in range(4)
        )
        self.value, self.output = (nn.Linear(embed_dim, embed_dim) for _ in range(2))
        initialise(self)

    def forward(self, x: Tensor, position: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Content and position are (B, Q, C), as the result; `attn_mask` as of `DecoderLayer`."""
        dropout = self.training * self.dropout
        return self.output(attend(*self.project(x, position, attn_mask), dropout))

    def weights(self, x: Tensor, position: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Whom each query attends to, (B, Q, Q), a mean over heads; rows sum to 1."""
        return mean_weights(*self.project(x, position, attn_mask))

    def project(
        self, x: Tensor, position: Tensor, attn_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Query, key and value of each head, (B, Q, H, .), and the mask as of PyTorch."""
        query = self.query_content(x) + self.query_position(position)
        key = self.key_content(x) + self.key_position(position)
        query, key, value = (
            y.unflatten(-1, (self.num_heads, -1)) for y in (query, key, self.value(x))
        )
        return query, key, value, allowed(attn_mask, self.num_heads)


class ConditionalCrossAttention(nn.Module):
    """Attention to every token that is not padding, with separate content and position.

    They are concatenated in each head, so that their dot products are added.

    Args:
        embed_dim, num_heads, dropout: as of :class:`DenseAttention`
        first: whether positions are added to the content as well, as in the first decoder layer,
            whose content has not seen the image yet
    """

    def __init__(
        self, *, embed_dim: int, num_heads: int, dropout: float = 0.0, first: bool = False
    ):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query_content, self.query_sine, self.key_content, self.key_position = (
            nn.Linear(embed_dim, embed_dim) for _ in range(4)
        )
        self.query_position = nn.Linear(embed_dim, embed_dim) if first else None
        self.value, self.output = (nn.Linear(embed_dim, embed_dim) for _ in range(2))
        initialise(self)

    def forward(self, x: Tensor, position: Tensor, sine: Tensor, memory: FeaturePyramid) -> Tensor:
        """Attend to the memory; returns (B, Q, C).

        Args:
            x: (B, Q, C) content of the queries
            position: (B, Q, C), added to the content in the first layer
            sine: (B, Q, C), encoding of the place to look at
            memory: of the encoder
        """
        dropout = self.training * self.dropout
        return self.output(attend(*self.project(x, position, sine, memory), dropout))

    def weights(self, x: Tensor, position: Tensor, sine: Tensor, memory: FeaturePyramid) -> Tensor:
        """What each query attends to, (B, Q, S), a mean over heads; rows sum to 1."""
        return mean_weights(*self.project(x, position, sine, memory))

    def project(
        self, x: Tensor, position: Tensor, sine: Tensor, memory: FeaturePyramid
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key and value of each head, (B, ., H, .), and where tokens are not padding."""
        query, key = self.query_content(x), self.key_content(memory.tokens)
        key_position = self.key_position(memory.position)
        if self.query_position is not None:
            query, key = query + self.query_position(position), key + key_position
        query, sine, key, key_position, value = (
            y.unflatten(-1, (self.num_heads, -1))
            for y in (query, self.query_sine(sine), key, key_position, self.value(memory.tokens))
        )
        query, key = torch.cat([query, sine], -1), torch.cat([key, key_position], -1)
        return query, key, value, ~memory.padding[:, None, None]


def allowed(attn_mask: Tensor | None, num_heads: int) -> Tensor | None:
    """A mask of `DecoderLayer` as `attend` takes it: True where attention is allowed."""
    if attn_mask is None:
        return None
    mask = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask
    return mask.unflatten(0, (-1, num_heads)) if mask.dim() == 3 else mask


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
) -> Tensor:
    """Scaled dot-product attention of (B, Q, H, .) to (B, S, H, .), joined to (B, Q, C)."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return y.transpose(1, 2).flatten(2)


def mean_weights(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The weights of :func:`attend` (B, Q, S), a mean over heads."""
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    if mask is not None:
        added = torch.zeros_like(logits)
        allowed = mask.dtype == torch.bool
        logits = logits + (added.masked_fill(~mask, -torch.inf) if allowed else mask)
    return logits.softmax(-1).mean(1)


def initialise(attention: nn.Module) -> None:
    """As DAB-DETR initialises its transformer."""
    xavier_uniform_(attention)
    nn.init.zeros_(attention.get_parameter("output.bias"))
