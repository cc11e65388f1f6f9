"""Flux.1 Kontext: Flux.1 that is given a picture beside the instruction what to change in it.

The reference enters as clean tokens behind the noisy ones, of the same time and in plane 1 of the positions: the pipeline knows no
time 0 for it. It is resized as a whole to the nearest in aspect of 17 sizes of about a megapixel. Source: diffusers'
`pipeline_flux_kontext.py`; all else is in `atelier_runtime.family_parts.two_stream`.
"""

from typing import Any

from PIL import Image

from atelier_runtime.family import SampleRequest
from atelier_runtime.family_parts.two_stream import TwoStream, TwoStreamControl

PUBLISHED_EDGE = 1024
"""Edge of the square whose area the pipeline's sizes have."""


class KontextControl(TwoStreamControl):
    """The network of Flux.1, in a pipeline of ours: diffusers has none that takes a condition beside a reference."""

    pipeline = "FluxKontextControlNetPipeline"
    drawn = False


class FluxKontext(TwoStream):
    name = "flux_kontext"
    pipeline = "FluxKontextPipeline"
    control = KontextControl()

    def reference_size(self, width: int, height: int, resolution: int) -> tuple[int, int]:
        """The pipeline's own size at a resolution of 1024, and in proportion at others."""
        from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

        aspect = width / height
        _, wide, high = min((abs(aspect - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        multiple = self.facts.pixel_multiple
        across, down = (round(side * resolution / PUBLISHED_EDGE / multiple) * multiple for side in (wide, high))
        return max(across, multiple), max(down, multiple)

    def sampling_arguments(self, pipe: Any, request: SampleRequest) -> dict[str, Any]:
        """Adds the reference, in the size that it is trained in, and the area, without which any size would become a megapixel."""
        arguments = super().sampling_arguments(pipe, request) | {"max_area": request.width * request.height}
        if request.references:
            [reference] = request.references
            size = self.reference_size(*reference.size, request.resolution)
            arguments |= {"image": reference.resize(size, Image.Resampling.LANCZOS), "_auto_resize": False}
        return arguments


FAMILY = FluxKontext()
