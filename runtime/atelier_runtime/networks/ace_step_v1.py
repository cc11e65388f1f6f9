"""The denoiser of ACE-Step v1, with the module names of its published checkpoint.

Latents of 16 rows become one token for each of their columns. Equal blocks follow: linear attention over the columns with rotary
positions, attention to a speaker, a caption and lyrics, and a gated feed-forward whose convolution sees the neighbours in time. Time
modulates all tokens alike. Lyrics go through an encoder that is part of the network.

The first layers normalise over all columns, so a sample takes no padding: it runs at its own length, in music, caption and lyrics.
Linear attention, modulation and positions compute in fp32 whatever the weights are stored in. docs/models/ace-step-v1.md has the names
and shapes, and what of the published network is not used. Facts: https://github.com/ace-step/ACE-Step (Apache-2.0), arXiv:2506.00045.

Letters in shapes: B batch, T columns of latents, C hidden size, L caption tokens, N lyric tokens, S = 1 + L + N.
"""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional

from atelier_runtime.networks.ace_step_v1_lyrics import LyricEncoder
from atelier_runtime.networks.attention import attended, split_heads, without_autocast

EPSILON = 1e-6
ATTENTION_EPSILON = 1e-15
FREQUENCIES = 256
STEM_MULTIPLE = 256
STEM_GROUPS = 32

Rotary = tuple[Tensor, Tensor]
"""Cosine and sine for every position and channel, [N, head size] each, fp32."""


class ACEStepTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """The published network. Arguments are those of its `config.json`; the last four, of the lyric encoder, are not in there: their
    defaults are those of the maker's code.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["LinearTransformerBlock"]  # noqa: RUF012
    _repeated_blocks = ["LinearTransformerBlock"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        in_channels: int = 8,
        out_channels: int = 8,
        num_layers: int = 24,
        num_attention_heads: int = 20,
        attention_head_dim: int = 128,
        mlp_ratio: float = 2.5,
        patch_size: Sequence[int] = (16, 1),
        rope_theta: float = 1_000_000.0,
        speaker_embedding_dim: int = 512,
        text_embedding_dim: int = 768,
        lyric_encoder_vocab_size: int = 6693,
        lyric_hidden_size: int = 1024,
        ssl_latent_dims: Sequence[int] = (1024, 768),
        lyric_layers: int = 6,
        lyric_heads: int = 16,
        lyric_mlp_width: int = 4096,
        lyric_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if patch_size[1] != 1:
            raise ValueError(
                f"patch_size is {tuple(patch_size)}; its second must be 1, a token for each column of latents"
            )
        width = num_attention_heads * attention_head_dim
        self.proj_in = PatchEmbedding(in_channels, width, patch_size[0])
        self.time_proj = Timesteps(FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(FREQUENCIES, width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.speaker_embedder = nn.Linear(speaker_embedding_dim, width)
        self.genre_embedder = nn.Linear(text_embedding_dim, width)
        self.lyric_embs = nn.Embedding(lyric_encoder_vocab_size, lyric_hidden_size)
        self.lyric_encoder = LyricEncoder(
            lyric_hidden_size, lyric_heads, lyric_layers, mlp_width=lyric_mlp_width, dropout=lyric_dropout
        )
        self.lyric_proj = nn.Linear(lyric_hidden_size, width)
        self.transformer_blocks = nn.ModuleList(
            LinearTransformerBlock(width, num_attention_heads, int(width * mlp_ratio)) for _ in range(num_layers)
        )
        self.projectors = nn.ModuleList(projector(width, outputs) for outputs in ssl_latent_dims)
        self.final_layer = FinalLayer(width, patch_size[0], out_channels)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_text_hidden_states: Tensor,
        speaker_embeds: Tensor,
        lyric_token_idx: Tensor,
        lyric_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The flow from the music to noise (noise - clean), [B, 8, 16, T].

        `hidden_states` [B, 8, 16, T]; `timestep` [B], 1000 is noise; `encoder_text_hidden_states` [B, L, 768]; `speaker_embeds`
        [B, 512], zeros where no voice is asked for; `lyric_token_idx` [B, N], N at least 1; `lyric_mask` [B, N] is zero where a token
        is not to be seen. Without a mask all are.
        """
        dtype = self.speaker_embedder.weight.dtype
        time = self.timestep_embedder(self.time_proj(timestep).to(dtype))  # [B, C]
        modulation = torch.unflatten(self.t_block(time), -1, (6, -1))  # [B, 6, C]
        told = self._told(encoder_text_hidden_states.to(dtype), speaker_embeds.to(dtype), lyric_token_idx)
        mask = None if lyric_mask is None else self._mask(lyric_mask, told.shape[1])
        hidden = self.proj_in(hidden_states.to(dtype))
        head_width = self.config.attention_head_dim
        places, told_places = (
            rotary_table(tokens.shape[1], head_width, self.config.rope_theta, tokens.device)
            for tokens in (hidden, told)
        )
        for block in self.transformer_blocks:
            hidden = self._through(block, hidden, told, mask, modulation, places, told_places)
        output = self.final_layer(hidden, time)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _told(self, text: Tensor, speaker: Tensor, lyrics: Tensor) -> Tensor:
        """[B, S, C]: the speaker, the caption, the lyrics."""
        words, distances = self.lyric_encoder.start(self.lyric_embs(lyrics))
        for block in self.lyric_encoder.encoders:
            words = self._through(block, words, distances)
        words = self.lyric_proj(self.lyric_encoder.after_norm(words))
        return torch.cat([self.speaker_embedder(speaker).unsqueeze(1), self.genre_embedder(text), words], dim=1)

    def _through(self, block: nn.Module, *arguments: object) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *arguments)
        return block(*arguments)

    def _mask(self, lyrics: Tensor, tokens: int) -> Tensor:
        """[B, 1, 1, S], false for lyrics that are not to be seen."""
        return functional.pad(lyrics.bool(), (tokens - lyrics.shape[1], 0), value=True)[:, None, None, :]


class LinearTransformerBlock(nn.Module):
    """Linear attention, attention to what is told, and feed-forward; time modulates the first and the last of them."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn = LinearAttention(width, heads)
        self.cross_attn = CrossAttention(width, heads)
        self.ff = GatedFeedForward(width, mlp_width)

    def forward(
        self,
        hidden: Tensor,
        told: Tensor,
        told_mask: Tensor | None,
        modulation: Tensor,
        places: Rotary,
        told_places: Rotary,
    ) -> Tensor:
        """`hidden` [B, T, C] to the same; `told` [B, S, C]; `modulation` [B, 6, C]."""
        parts = (self.scale_shift_table + modulation).float().unsqueeze(2).unbind(1)  # six of [B, 1, C]
        shift, scale, gate = parts[:3]
        hidden = gated(hidden, self.attn(modulated(hidden, shift, scale), places), gate)
        hidden = hidden + self.cross_attn(hidden, told, told_mask, places, told_places)
        shift, scale, gate = parts[3:]
        return gated(hidden, self.ff(modulated(hidden, shift, scale)), gate)


class LinearAttention(nn.Module):
    """Attention without a softmax: each token is weighed by ReLU(key) * ReLU(query), and the weights are divided by their sum."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, hidden: Tensor, places: Rotary) -> Tensor:
        query, key, value = (split_heads(layer(hidden), self.heads) for layer in (self.to_q, self.to_k, self.to_v))
        output = linearly_attended(rotated(query, places), rotated(key, places), value)
        return self.to_out[0](output.to(hidden.dtype))


class CrossAttention(nn.Module):
    """Attention of the music to what is told, both with positions.

    The published network also has `add_q_proj`, `add_k_proj`, `add_v_proj` and `to_add_out`, which it never calls.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.add_k_proj = nn.Linear(width, width)
        self.add_v_proj = nn.Linear(width, width)
        self.add_q_proj = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.to_add_out = nn.Linear(width, width)

    def forward(self, hidden: Tensor, told: Tensor, mask: Tensor | None, places: Rotary, told_places: Rotary) -> Tensor:
        query = rotated(split_heads(self.to_q(hidden), self.heads), places)
        key = rotated(split_heads(self.to_k(told), self.heads), told_places)
        return self.to_out[0](attended(query, key, split_heads(self.to_v(told), self.heads), mask))


class GatedFeedForward(nn.Module):
    """Twice `mlp_width` channels, mixed with their neighbours in time; one half gates the other."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.inverted_conv = Convolution(nn.Conv1d(width, 2 * mlp_width, 1))
        self.depth_conv = Convolution(nn.Conv1d(2 * mlp_width, 2 * mlp_width, 3, padding=1, groups=2 * mlp_width))
        self.point_conv = Convolution(nn.Conv1d(mlp_width, width, 1, bias=False))

    def forward(self, hidden: Tensor) -> Tensor:
        wide = functional.silu(self.inverted_conv(hidden.transpose(1, 2)))
        values, gates = self.depth_conv(wide).chunk(2, dim=1)
        return self.point_conv(values * functional.silu(gates)).transpose(1, 2)


class Convolution(nn.Module):
    """A convolution under the name `conv`."""

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, channels: Tensor) -> Tensor:
        return self.conv(channels)


class PatchEmbedding(nn.Module):
    """Latents [B, 8, rows, T] to tokens [B, T, C]."""

    def __init__(self, channels: int, width: int, rows: int) -> None:
        super().__init__()
        inner = STEM_MULTIPLE * channels
        self.early_conv_layers = nn.Sequential(
            nn.Conv2d(channels, inner, (rows, 1), (rows, 1)),
            nn.GroupNorm(STEM_GROUPS, inner, eps=EPSILON),
            nn.Conv2d(inner, width, 1),
        )

    def forward(self, latents: Tensor) -> Tensor:
        return self.early_conv_layers(latents).flatten(2).transpose(1, 2)


class FinalLayer(nn.Module):
    """Tokens [B, T, C] to latents [B, 8, rows, T]."""

    def __init__(self, width: int, rows: int, channels: int) -> None:
        super().__init__()
        self.rows = rows
        self.linear = nn.Linear(width, rows * channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        """`time` [B, C] is its embedding."""
        shift, scale = (self.scale_shift_table + time.unsqueeze(1)).float().unsqueeze(2).unbind(1)
        columns = torch.unflatten(self.linear(modulated(hidden, shift, scale)), -1, (self.rows, -1))
        return columns.permute(0, 3, 2, 1)  # within a token, the channel varies fastest


def projector(width: int, outputs: int) -> nn.Sequential:
    """Features of a block to those of a model that hears music: of use to the maker's training alone, and not called here."""
    inner = 2 * width
    return nn.Sequential(
        nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, inner), nn.SiLU(), nn.Linear(inner, outputs)
    )


def linearly_attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, heads, N, D] each to [B, N, C], heads joined again, in fp32.

    Sums over tokens of many thousands lose too much in bf16.
    """
    with without_autocast(query.device.type):
        query, key, value = functional.relu(query).float(), functional.relu(key).float(), value.float()
        weighed = query @ (key.transpose(-1, -2) @ value)
        weights = query @ key.sum(dim=2).unsqueeze(-1)
        return (weighed / (weights + ATTENTION_EPSILON)).transpose(1, 2).flatten(2)


def modulated(hidden: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`hidden` [B, T, C] under an RMS norm, scaled and shifted in fp32; `shift` and `scale` are [B, 1, C]."""
    normed = functional.rms_norm(hidden.float(), hidden.shape[-1:], eps=EPSILON)
    return (normed * (1 + scale) + shift).to(hidden.dtype)


def gated(hidden: Tensor, change: Tensor, gate: Tensor) -> Tensor:
    """`hidden` + gate * `change`, [B, T, C], summed in fp32; `gate` is [B, 1, C]."""
    return (hidden + gate * change).to(hidden.dtype)


def rotary_table(length: int, head_width: int, base: float, device: torch.device) -> Rotary:
    """Angles of positions 0 to `length` - 1 for the channels of a head: channel c turns at the speed of c modulo half of the head.

    Its neighbour, with which it is turned, has another speed, so this is no rotation; the published weights are trained with it.
    """
    speeds = base ** (-torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), speeds).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotated(channels: Tensor, places: Rotary) -> Tensor:
    """[B, heads, N, D], each channel with its neighbour turned by its own angle, in fp32."""
    cosine, sine = places
    first, second = torch.unflatten(channels.float(), -1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return (channels.float() * cosine + turned * sine).to(channels.dtype)
