"""Sizes of Qwen-Image-Edit: those of Qwen-Image, which it was made from. Each reference adds the tokens of a megapixel, whatever the
size of the target, and those that the text encoder makes of it.
"""

from dataclasses import replace

from atelier_api.families.qwen_image import FACTS as QWEN_IMAGE

_CAPTION = 512  # a long one: it is not cut
_BASE = replace(QWEN_IMAGE.flavours[0], control_parameters=0, control_layers=0)
_PLUS = replace(_BASE, text_tokens=_CAPTION + 3 * 196)  # of three pictures of 392 x 392

FACTS = replace(
    QWEN_IMAGE,
    name="qwen_image_edit",
    title="Qwen-Image-Edit, edits of pictures",
    flavours=(
        # Its tokens keep a modulation each, since those of references have another time.
        replace(_PLUS, name="2511", source="hf://Qwen/Qwen-Image-Edit-2511", activation_bytes_per_token=157_000),
        replace(_PLUS, name="2509", source="hf://Qwen/Qwen-Image-Edit-2509"),
        # Its encoder sees a picture of 1036 x 1036.
        replace(_BASE, name="v1", source="hf://Qwen/Qwen-Image-Edit", text_tokens=_CAPTION + 1369),
    ),
    pipelines=("QwenImageEditPlusPipeline", "QwenImageEditPipeline"),
    references=3,
    reference_edge=1024,
    uncontrolled="diffusers has no pipeline that takes a condition beside its references",
)
