"""Kandinsky 5.0 Video."""

from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)
from transformers import CLIPTextModel

from family_models.kinds import Published, Tiny
from family_models.parts import add_words, chat_tokenizer, clip_config, clip_tokenizer, seeded, vision_language_encoder
from family_models.published_parts import CLIP_L, qwen25_vl_7b

CHANNELS = 16


def tiny() -> Kandinsky5T2VPipeline:
    text_width, clip_width = 32, 16
    clip = clip_config(clip_width, clip_width)
    clip.max_position_embeddings = 77  # the pipeline pads to them
    pipe = Kandinsky5T2VPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=seeded(
            lambda: AutoencoderKLHunyuanVideo(
                block_out_channels=(8,) * 4,
                layers_per_block=1,
                norm_num_groups=4,
                latent_channels=CHANNELS,
                mid_block_add_attention=False,
            )
        ),
        text_encoder=vision_language_encoder(text_width, vocabulary=512),
        tokenizer=chat_tokenizer(),
        text_encoder_2=seeded(lambda: CLIPTextModel(clip)),
        tokenizer_2=clip_tokenizer(),
        transformer=seeded(
            lambda: Kandinsky5Transformer3DModel(
                in_visual_dim=CHANNELS,
                out_visual_dim=CHANNELS,
                in_text_dim=text_width,
                in_text_dim2=clip_width,
                time_dim=16,
                model_dim=32,
                ff_dim=48,
                num_text_blocks=1,
                num_visual_blocks=2,
                axes_dims=(4, 6, 6),
                visual_cond=True,
            )
        ),
    )
    add_words(pipe.tokenizer, pipe.prompt_template)
    return pipe


TINY = {
    "kandinsky5_video": Tiny(
        tiny,
        to_grid=lambda _, latents: latents[..., :CHANNELS].movedim(-1, 1),
        from_grid=lambda _, grid: grid.movedim(1, -1),
        guided={"guidance_scale": 3.0, "negative_prompt": ""},
    )
}

_VISUAL = {"in_visual_dim": CHANNELS, "out_visual_dim": CHANNELS, "visual_cond": True}
LITE = _VISUAL | {"model_dim": 1792, "ff_dim": 7168, "time_dim": 512}
PRO = _VISUAL | {
    "model_dim": 4096,
    "ff_dim": 16384,
    "time_dim": 1024,
    "num_text_blocks": 4,
    "num_visual_blocks": 60,
    "axes_dims": (32, 48, 48),
}
PUBLISHED = Published(
    denoisers={
        "t2v-lite-sft-5s": (Kandinsky5Transformer3DModel, LITE),
        "t2v-lite-pretrain-5s": (Kandinsky5Transformer3DModel, LITE),
        "t2v-pro-sft-5s": (Kandinsky5Transformer3DModel, PRO),
        "t2v-pro-pretrain-5s": (Kandinsky5Transformer3DModel, PRO),
    },
    encoders=lambda: [qwen25_vl_7b(), CLIPTextModel(CLIP_L)],
    autoencoder=AutoencoderKLHunyuanVideo,
)
