"""LTX Video 0.9.0 and 0.9.1, text to video: flow matching on clips in a latent space of high compression.

All of it is in `atelier_runtime.family_parts.ltx`; the family that is shown the first frame is `ltx_i2v`. Checkpoints from 0.9.5 on
sample with `LTXConditionPipeline`, whose positions in time are others: they are refused by that name.
"""

from atelier_runtime.family import TimeEmbedder
from atelier_runtime.family_parts.ltx import LTXNetwork


class LTX(LTXNetwork):
    name = "ltx"
    pipeline = "LTXPipeline"
    time_embedder = TimeEmbedder("time_embed.emb.timestep_embedder", "time_embed.emb.time_proj", scale=1000)


FAMILY = LTX()
