"""What the families around diffusers' `LongCatImageTransformer2DModel` share: layers, and the call.

Latents [B, 16, H/8, W/8] of Flux's autoencoder enter as 2 x 2 patches, [B, HW/256, 64]; time is sigma itself. There is no mask of
text, so its length is part of the model. A reference picture enters as clean tokens behind the noisy ones, of the same time, in a
plane of positions of its own. Source: diffusers' `pipeline_longcat_image.py`, `pipeline_longcat_image_edit.py` and
`transformer_longcat_image.py`.

The stock pipelines have no LoRA loader. An exported file is loaded by their transformer:

    pipe.transformer.load_lora_adapter(folder, weight_name="pytorch_lora_weights.safetensors", prefix="transformer")
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier_runtime.family import Blocks, Conditions, Family, TimeEmbedder

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out")
TEXT, PICTURE = 0, 1  # first coordinate of a token's position; references follow


class LongCatImageNetwork(Family):
    """Everything but text, and what pictures are edited."""

    lora_targets = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}  # noqa: RUF012
    blocks = (Blocks("transformer_blocks", "text,tokens"), Blocks("single_transformer_blocks", "text,tokens"))
    time_embedder = TimeEmbedder("time_embed.timestep_embedder", "time_embed.time_proj", scale=1000)

    def predict(self, denoiser: nn.Module, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Noise - clean of the noisy tokens, [B, 16, H, W]; what comes out behind them, in the references' place, is cut off.

        Rows and columns of the pictures count on from the text's last token.
        """
        embeds = conditions.text["embeds"]
        length = embeds.shape[1]
        pictures = (noisy, *conditions.references)
        rows, columns = noisy.shape[-2] // 2, noisy.shape[-1] // 2
        text = torch.arange(length, device=noisy.device)
        tokens = denoiser(
            hidden_states=torch.cat(
                [F.pixel_unshuffle(each, 2).flatten(2).transpose(1, 2) for each in pictures], dim=1
            ),
            timestep=time,
            encoder_hidden_states=embeds,
            txt_ids=torch.stack([torch.full_like(text, TEXT), text, text], dim=1),
            img_ids=torch.cat([_positions(plane, length, each) for plane, each in enumerate(pictures, PICTURE)]),
            return_dict=False,
        )[0][:, : rows * columns]
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (rows, columns)), 2)


def _positions(plane: int, start: int, latents: Tensor) -> Tensor:
    """[tokens, 3]: (plane, row, column) of every token of a picture, rows and columns from `start`."""
    rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
    ends = ((plane, plane + 1), (start, start + rows), (start, start + columns))
    return torch.cartesian_prod(*(torch.arange(*each, device=latents.device) for each in ends))
