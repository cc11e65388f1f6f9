"""The lyric encoder of ACE-Step v1: a Conformer without its convolutions, with the module names of the published checkpoint.

Attention knows how far apart two tokens are, from -N to N, by waves of their distance (arXiv:1901.02860, appendix B). Names and sizes
are in docs/models/ace-step-v1.md. Facts: https://github.com/ace-step/ACE-Step (Apache-2.0).

Letters in shapes: B batch, N lyric tokens, C hidden size, D channels of a head.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from atelier_runtime.networks.attention import attended, split_heads

WAVE_BASE = 10_000.0


class LyricEncoder(nn.Module):
    """Embeddings of lyric tokens to features of the same size. `dropout` is of activations while training; attention has none."""

    def __init__(self, width: int, heads: int, layers: int, *, mlp_width: int, dropout: float) -> None:
        super().__init__()
        self.embed = LyricEmbedding(width, dropout)
        self.dropout = nn.Dropout(dropout)
        self.encoders = nn.ModuleList(LyricBlock(width, heads, mlp_width, dropout) for _ in range(layers))
        self.after_norm = nn.LayerNorm(width)

    def start(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What the blocks take: hidden states of `tokens` [B, N, C], and the waves [2N - 1, C] of all distances."""
        hidden = self.embed(tokens)
        return self.dropout(hidden), self.dropout(waves(hidden.shape[1], hidden.shape[2], hidden.device).to(hidden))


class LyricEmbedding(nn.Module):
    """A linear layer, normalised, in the scale that positions are added in."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.out = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Dropout(dropout))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(tokens) * math.sqrt(tokens.shape[-1])


class LyricBlock(nn.Module):
    """Self-attention and feed-forward, each behind a norm and added to its input."""

    def __init__(self, width: int, heads: int, mlp_width: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = RelativeAttention(width, heads)
        self.feed_forward = LyricFeedForward(width, mlp_width, dropout)
        self.norm_mha = nn.LayerNorm(width)
        self.norm_ff = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, distances: Tensor) -> Tensor:
        """`hidden` [B, N, C] to the same; `distances` [2N - 1, C]."""
        hidden = hidden + self.dropout(self.self_attn(self.norm_mha(hidden), distances))
        return hidden + self.dropout(self.feed_forward(self.norm_ff(hidden)))


class RelativeAttention(nn.Module):
    """Scores ((q_i + u) k_j + (q_i + v) r_(i-j)) / sqrt(D) with learnt u, v and projected waves r of the distance."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.linear_q = nn.Linear(width, width)
        self.linear_k = nn.Linear(width, width)
        self.linear_v = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)
        self.linear_pos = nn.Linear(width, width, bias=False)
        self.pos_bias_u = nn.Parameter(torch.empty(heads, width // heads))
        self.pos_bias_v = nn.Parameter(torch.empty(heads, width // heads))
        nn.init.xavier_uniform_(self.pos_bias_u)
        nn.init.xavier_uniform_(self.pos_bias_v)

    def forward(self, hidden: Tensor, distances: Tensor) -> Tensor:
        query, key, value = (
            split_heads(layer(hidden), self.heads) for layer in (self.linear_q, self.linear_k, self.linear_v)
        )
        relative = split_heads(self.linear_pos(distances).unsqueeze(0), self.heads)  # [1, heads, 2N - 1, D]
        scores = (query + self.pos_bias_v.unsqueeze(1)) @ relative.transpose(-1, -2) / math.sqrt(query.shape[-1])
        added = by_distance(scores).to(value.dtype)
        return self.linear_out(attended(query + self.pos_bias_u.unsqueeze(1), key, value, added))


class LyricFeedForward(nn.Module):
    def __init__(self, width: int, mlp_width: int, dropout: float) -> None:
        super().__init__()
        self.w_1 = nn.Linear(width, mlp_width)
        self.w_2 = nn.Linear(mlp_width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.w_2(self.dropout(functional.silu(self.w_1(hidden))))


def waves(length: int, width: int, device: torch.device) -> Tensor:
    """[2 length - 1, width]: sines in even channels and cosines in odd ones of the distances length - 1 down to 1 - length."""
    speeds = WAVE_BASE ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    distances = torch.arange(length - 1, -length, -1, device=device, dtype=torch.float32)
    angles = torch.outer(distances, speeds)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def by_distance(scores: Tensor) -> Tensor:
    """[..., N, 2N - 1] scores by distance, in the order of `waves`, to [..., N, N]: that of query i and key j is at i - j."""
    length = scores.shape[-2]
    places = torch.arange(length, device=scores.device)
    columns = length - 1 - places.unsqueeze(1) + places
    return scores.gather(-1, columns.expand(*scores.shape[:-1], length))
