"""Networks and pipelines of published models that diffusers lacks, under the class names that their checkpoints give.

They are diffusers models and pipelines in every other respect, so that nothing else of the runtime knows the difference.
"""

from atelier_runtime.networks.longcat_video import LongCatVideoTransformer3DModel
from atelier_runtime.networks.longcat_video_pipeline import LongCatVideoPipeline

__all__ = ["LongCatVideoPipeline", "LongCatVideoTransformer3DModel"]
