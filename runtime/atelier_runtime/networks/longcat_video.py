"""The denoiser of LongCat-Video, with the module names of its published checkpoint.

A stack of equal blocks over the tokens of all frames: self-attention with rotary positions in three axes, cross-attention to the
caption, a gated feed-forward. Each frame has a time of its own, which modulates the tokens of that frame.

Time, modulation, norms and the output layer compute in fp32 whatever the weights are stored in, as at the maker's. Not here: block
sparse attention, distilled schedules, and the cache of keys and values for the continuation of clips, all of which serve sampling.
docs/models/longcat-video.md has the table of names and shapes. Facts: https://github.com/meituan-longcat/LongCat-Video (MIT).

Letters in shapes: B batch, F latent frames, H and W latent rows and columns, N = F * H/2 * W/2 tokens, C hidden size, L text tokens.
"""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import FP32LayerNorm
from torch import Tensor, nn
from torch.nn import functional

from atelier_runtime.networks.attention import attended, split_heads, without_autocast

ROTARY_BASE = 10_000.0
EPSILON = 1e-6
FEED_FORWARD_MULTIPLE = 256  # the width of the feed-forward is rounded up to it

Rotary = tuple[Tensor, Tensor]
"""Cosine and sine of every token's angles, [N, head size / 2] each, fp32."""


class LongCatVideoTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """The published network. Arguments are those of `dit/config.json`; what steers attention kernels there has no part here.

    `text_tokens_zero_pad`: padding of captions is set to zero behind the text projection and attended to. Otherwise it is masked.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["LongCatVideoBlock"]  # noqa: RUF012
    _repeated_blocks = ["LongCatVideoBlock"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        out_channels: int = 16,
        hidden_size: int = 4096,
        depth: int = 48,
        num_heads: int = 32,
        caption_channels: int = 4096,
        mlp_ratio: int = 4,
        adaln_tembed_dim: int = 512,
        frequency_embedding_size: int = 256,
        patch_size: Sequence[int] = (1, 2, 2),
        text_tokens_zero_pad: bool = False,
    ) -> None:
        super().__init__()
        if patch_size[0] != 1:
            raise ValueError(
                f"patch_size is {tuple(patch_size)}; its first must be 1, as each latent frame has a time of its own"
            )
        self.x_embedder = PatchEmbedding(in_channels, hidden_size, patch_size)
        self.t_embedder = TimeEmbedding(frequency_embedding_size, adaln_tembed_dim)
        self.y_embedder = CaptionEmbedding(caption_channels, hidden_size)
        self.blocks = nn.ModuleList(
            LongCatVideoBlock(hidden_size, num_heads, mlp_ratio, adaln_tembed_dim) for _ in range(depth)
        )
        patch = patch_size[0] * patch_size[1] * patch_size[2]
        self.final_layer = FinalLayer(hidden_size, patch * out_channels, adaln_tembed_dim)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        num_cond_latents: int = 0,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The flow from noise to the clean clip (clean - noise), [B, 16, F, H, W], fp32.

        `hidden_states` [B, 16, F, H, W]; `timestep` [B], or [B, F] for a time per frame, 1000 is noise; `encoder_hidden_states`
        [B, L, D]; `encoder_attention_mask` [B, L], non-zero where there is text. The first `num_cond_latents` frames are a
        clean condition: they see only themselves and no text.
        """
        frames = hidden_states.shape[2]
        dtype = self.x_embedder.proj.weight.dtype
        if timestep.ndim == 1:
            timestep = timestep.unsqueeze(1).expand(-1, frames)
        time = self.t_embedder(timestep.to(dtype))  # rounded to the weights' precision, as the maker's network does
        text, text_mask = self._embedded_text(encoder_hidden_states.to(dtype), encoder_attention_mask)
        patches = self.x_embedder(hidden_states.to(dtype))  # [B, C, F, H/2, W/2]
        grid = tuple(patches.shape[2:])
        hidden = patches.flatten(2).transpose(1, 2)
        rotary = rotary_table(grid, self.config.hidden_size // self.config.num_heads, hidden.device)
        arguments = (text, text_mask, time, rotary, num_cond_latents)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden = self._gradient_checkpointing_func(block, hidden, *arguments)
            else:
                hidden = block(hidden, *arguments)
        output = self._without_patches(self.final_layer(hidden, time), grid)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _embedded_text(self, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Text tokens [B, L, C], and the mask [B, 1, 1, L] of those that are attended to, None for all."""
        embedded = self.y_embedder(text)
        if mask is None:
            return embedded, None
        if self.config.text_tokens_zero_pad:
            return embedded * mask.unsqueeze(-1).to(embedded), None
        return embedded, mask.bool()[:, None, None, :]

    def _without_patches(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """[B, N, patch * channels] to [B, channels, F, H, W]; within a token the channel varies fastest."""
        cells = torch.unflatten(torch.unflatten(tokens, -1, (*self.config.patch_size, -1)), 1, tuple(grid))
        spread = cells.permute(
            0, 7, 1, 4, 2, 5, 3, 6
        )  # channels, then each axis of the grid before the same of the patch
        return spread.flatten(6, 7).flatten(4, 5).flatten(2, 3).float()


class LongCatVideoBlock(nn.Module):
    """Self-attention and feed-forward, both modulated by the frame's time, and cross-attention to the text between them."""

    def __init__(self, width: int, heads: int, mlp_ratio: int, time_width: int) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Fp32Linear(time_width, 6 * width))
        self.mod_norm_attn = FP32LayerNorm(width, eps=EPSILON, elementwise_affine=False)
        self.mod_norm_ffn = FP32LayerNorm(width, eps=EPSILON, elementwise_affine=False)
        self.pre_crs_attn_norm = FP32LayerNorm(width, eps=EPSILON)
        self.attn = SelfAttention(width, heads)
        self.cross_attn = CrossAttention(width, heads)
        self.ffn = FeedForward(width, mlp_ratio)

    def forward(
        self, hidden: Tensor, text: Tensor, text_mask: Tensor | None, time: Tensor, rotary: Rotary, conditions: int
    ) -> Tensor:
        """`hidden` [B, N, C] to the same; `time` [B, F, T]; the first `conditions` frames are clean."""
        shifts_scales_gates = self.adaLN_modulation(time).unsqueeze(2).chunk(6, dim=-1)  # [B, F, 1, C] each, fp32
        attention, feed_forward = shifts_scales_gates[:3], shifts_scales_gates[3:]
        clean = conditions * (hidden.shape[1] // time.shape[1])
        changed = self.attn(modulated(self.mod_norm_attn, hidden, *attention[:2]), rotary, clean)
        hidden = gated(hidden, changed, attention[2])
        hidden = hidden + self.cross_attn(self.pre_crs_attn_norm(hidden), text, text_mask, clean)
        changed = self.ffn(modulated(self.mod_norm_ffn, hidden, *feed_forward[:2]))
        return gated(hidden, changed, feed_forward[2])


class SelfAttention(nn.Module):
    """Attention over all tokens, with norms per head before the rotation."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = HeadNorm(width // heads)
        self.k_norm = HeadNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor, rotary: Rotary, clean: int) -> Tensor:
        """`hidden` [B, N, C] to the same; the first `clean` tokens see only each other."""
        query, key, value = (split_heads(part, self.heads) for part in self.qkv(hidden).chunk(3, dim=-1))
        query, key = rotated(self.q_norm(query), rotary), rotated(self.k_norm(key), rotary)
        if clean:
            first = attended(query[:, :, :clean], key[:, :, :clean], value[:, :, :clean])
            rest = attended(query[:, :, clean:], key, value)
            return self.proj(torch.cat([first, rest], dim=1))
        return self.proj(attended(query, key, value))


class CrossAttention(nn.Module):
    """Attention of the clip's tokens to the caption's, without positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm = HeadNorm(width // heads)
        self.k_norm = HeadNorm(width // heads)

    def forward(self, hidden: Tensor, text: Tensor, text_mask: Tensor | None, clean: int) -> Tensor:
        """[B, N, C] for `hidden` [B, N, C] and `text` [B, L, C]: zero for the first `clean` tokens."""
        query = self.q_norm(split_heads(self.q_linear(hidden[:, clean:]), self.heads))
        key, value = (split_heads(part, self.heads) for part in self.kv_linear(text).chunk(2, dim=-1))
        output = self.proj(attended(query, self.k_norm(key), value, text_mask))
        return functional.pad(output, (0, 0, clean, 0)) if clean else output


class FeedForward(nn.Module):
    """SwiGLU of two thirds of `mlp_ratio`, rounded up, without biases."""

    def __init__(self, width: int, mlp_ratio: int) -> None:
        super().__init__()
        inner = -(-(2 * width * mlp_ratio // 3) // FEED_FORWARD_MULTIPLE) * FEED_FORWARD_MULTIPLE
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(hidden)) * self.w3(hidden))


class FinalLayer(nn.Module):
    """Tokens to patches of the prediction, in fp32."""

    def __init__(self, width: int, outputs: int, time_width: int) -> None:
        super().__init__()
        self.norm_final = FP32LayerNorm(width, eps=EPSILON, elementwise_affine=False)
        self.linear = Fp32Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Fp32Linear(time_width, 2 * width))

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(time).unsqueeze(2).chunk(2, dim=-1)
        return self.linear(modulated(self.norm_final, hidden, shift, scale))


class PatchEmbedding(nn.Module):
    """Latents [B, 16, F, H, W] to patches [B, C, F, H/2, W/2]."""

    def __init__(self, channels: int, width: int, patch_size: Sequence[int]) -> None:
        super().__init__()
        frames, rows, columns = patch_size
        patch = (frames, rows, columns)
        self.proj = nn.Conv3d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, latents: Tensor) -> Tensor:
        return self.proj(latents)


class TimeEmbedding(nn.Module):
    """Times [B, F] to [B, F, T], in fp32."""

    def __init__(self, frequencies: int, width: int) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(Fp32Linear(frequencies, width), nn.SiLU(), Fp32Linear(width, width))

    def forward(self, time: Tensor) -> Tensor:
        waves = get_timestep_embedding(
            time.float().flatten(), self.frequencies, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        return self.mlp(waves).unflatten(0, time.shape)


class CaptionEmbedding(nn.Module):
    """Features of the text encoder [B, L, D] to [B, L, C]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.y_proj = nn.Sequential(nn.Linear(channels, width), nn.GELU(approximate="tanh"), nn.Linear(width, width))

    def forward(self, text: Tensor) -> Tensor:
        return self.y_proj(text)


class HeadNorm(nn.Module):
    """RMS norm of one head's channels: normalised in fp32, scaled in the precision of the weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, channels: Tensor) -> Tensor:
        normed = functional.rms_norm(channels.float(), self.weight.shape, eps=EPSILON)
        return normed.to(channels.dtype) * self.weight


class Fp32Linear(nn.Linear):
    """A linear layer that computes in fp32 whatever its weights are stored in, also under autocast."""

    def forward(self, inputs: Tensor) -> Tensor:
        with without_autocast(inputs.device.type):
            return functional.linear(inputs.float(), self.weight.float(), self.bias.float())


def modulated(norm: nn.Module, hidden: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`hidden` [B, N, C] normalised, scaled and shifted per frame in fp32; `shift` and `scale` are [B, F, 1, C]."""
    frames = torch.unflatten(hidden.float(), 1, (shift.shape[1], -1))
    return (norm(frames) * (1 + scale) + shift).flatten(1, 2).to(hidden.dtype)


def gated(hidden: Tensor, change: Tensor, gate: Tensor) -> Tensor:
    """`hidden` + gate * `change`, [B, N, C], summed in fp32; `gate` is [B, F, 1, C]."""
    frames = gate.shape[1]
    summed = torch.unflatten(hidden, 1, (frames, -1)) + gate * torch.unflatten(change, 1, (frames, -1))
    return summed.flatten(1, 2).to(hidden.dtype)


def rotary_table(grid: Sequence[int], head_width: int, device: torch.device) -> Rotary:
    """Angles of the tokens of a grid of frames, rows and columns, in this order among a head's pairs of channels.

    Rows and columns have a third of the channels each, rounded down to pairs; frames have the rest.
    """
    third = 2 * (head_width // 6)
    angles = []
    for axis, (length, width) in enumerate(zip(grid, (head_width - 2 * third, third, third), strict=True)):
        speeds = ROTARY_BASE ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
        along = torch.outer(torch.arange(length, device=device, dtype=torch.float32), speeds)
        shape = [length if other == axis else 1 for other in range(3)]
        angles.append(along.view(*shape, -1).expand(*grid, -1))
    table = torch.cat(angles, dim=-1).flatten(0, 2)
    return table.cos(), table.sin()


def rotated(channels: Tensor, rotary: Rotary) -> Tensor:
    """[B, heads, N, D] with each pair of neighbouring channels turned by its angle, in fp32."""
    cosine, sine = rotary
    first, second = torch.unflatten(channels.float(), -1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return turned.flatten(-2).to(channels.dtype)
