"""Kandinsky 5.0 Image."""

from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5T2IPipeline, Kandinsky5Transformer3DModel
from transformers import CLIPTextModel

from family_models.kinds import Published, Tiny
from family_models.parts import (
    add_words,
    chat_tokenizer,
    clip_config,
    clip_tokenizer,
    kl_autoencoder,
    seeded,
    vision_language_encoder,
)
from family_models.published_parts import CLIP_L, kl_16, qwen25_vl_7b

CHANNELS = 16


def tiny() -> Kandinsky5T2IPipeline:
    text_width, clip_width = 32, 16
    clip = clip_config(clip_width, clip_width)
    clip.max_position_embeddings = 77  # the pipeline pads to them
    pipe = Kandinsky5T2IPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_autoencoder(CHANNELS, 0.3611, 0.1159),
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
            )
        ),
    )
    add_words(pipe.tokenizer, pipe.prompt_template)
    return pipe


TINY = {
    "kandinsky5_image": Tiny(
        tiny,
        to_grid=lambda _, latents: latents.squeeze(1).movedim(-1, 1),
        from_grid=lambda _, grid: grid.movedim(1, -1).unsqueeze(1),
    )
}

LITE = {
    "in_visual_dim": CHANNELS,
    "out_visual_dim": CHANNELS,
    "model_dim": 2560,
    "ff_dim": 10240,
    "time_dim": 512,
    "num_visual_blocks": 50,
    "axes_dims": (32, 48, 48),
}
PUBLISHED = Published(
    denoisers={
        "t2i-lite-sft": (Kandinsky5Transformer3DModel, LITE),
        "t2i-lite-pretrain": (Kandinsky5Transformer3DModel, LITE),
    },
    encoders=lambda: [qwen25_vl_7b(), CLIPTextModel(CLIP_L)],
    autoencoder=kl_16,
)
