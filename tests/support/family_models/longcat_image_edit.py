"""LongCat-Image-Edit: the parts of LongCat-Image in a pipeline of its own, with an encoder that is shown pictures."""

from dataclasses import replace

from diffusers import LongCatImageEditPipeline
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit

from family_models import longcat_image
from family_models.kinds import Published
from family_models.parts import add_words, picture_reader, scale_references_down

WIDTH, HEIGHT = 80, 64  # what the pipeline draws of the reference of the tests, which is 70 x 48


def tiny() -> LongCatImageEditPipeline:
    parts = longcat_image.tiny().components
    parts["text_processor"] = picture_reader(parts["text_encoder"], parts["tokenizer"])
    pipe = LongCatImageEditPipeline(**parts)
    add_words(pipe.tokenizer, pipe.prompt_template_encode_prefix + pipe.prompt_template_encode_suffix)
    scale_references_down(pipeline_longcat_image_edit)
    return pipe


TINY = {
    "longcat_image_edit": replace(
        longcat_image.TINY["longcat_image"],
        make=tiny,
        to_grid=lambda pipe, packed: LongCatImageEditPipeline._unpack_latents(
            packed, HEIGHT, WIDTH, pipe.vae_scale_factor
        ),
        guided={},
        width=WIDTH,
        height=HEIGHT,
    )
}

PUBLISHED = Published(
    denoisers={"base": longcat_image.PUBLISHED.denoisers["base"]},
    encoders=longcat_image.PUBLISHED.encoders,
    autoencoder=longcat_image.PUBLISHED.autoencoder,
)
