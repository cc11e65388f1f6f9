"""Flux.1: a flow transformer, first with two streams and then with one, distilled on guidance in most of its checkpoints.

Latents [B, 16, H/8, W/8] enter as 2 x 2 patches, [B, HW/256, 64]; time is sigma itself. Text: T5 tokens, padded and without mask,
so the length is part of the model, and CLIP's pooled vector. Source: diffusers' `pipeline_flux.py` and `transformer_flux.py`.
"""

from atelier_runtime.family_parts.two_stream import TwoStream, TwoStreamControl


class Flux(TwoStream):
    name = "flux"
    pipeline = "FluxPipeline"
    control = TwoStreamControl()


FAMILY = Flux()
