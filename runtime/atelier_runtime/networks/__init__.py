"""Networks and pipelines that diffusers lacks: of published models, under the class names that their checkpoints give, and control
networks for models that have none there.

They are diffusers models and pipelines in every other respect, so that nothing else of the runtime knows the difference. Each is read
when it is first asked for: every process of a run imports this package, and needs one of them at most. A pipeline's denoiser is here
beside it, also where diffusers has that.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atelier_runtime.networks.ace_step_v1 import ACEStepTransformer2DModel
    from atelier_runtime.networks.ace_step_v1_pipeline import ACEStepPipeline, GranularEulerScheduler
    from atelier_runtime.networks.ace_step_v1_sound import ADaMoSHiFiGANV1, MusicDCAE
    from atelier_runtime.networks.auraflow_control import AuraFlowControlNetModel
    from atelier_runtime.networks.control_pipelines import (
        AuraFlowControlNetPipeline,
        HiDreamImageControlNetPipeline,
        PixArtSigmaControlNetPipeline,
    )
    from atelier_runtime.networks.flux_kontext_control_pipeline import FluxKontextControlNetPipeline
    from atelier_runtime.networks.hidream_control import HiDreamImageControlNetModel
    from atelier_runtime.networks.longcat_video import LongCatVideoTransformer3DModel
    from atelier_runtime.networks.longcat_video_pipeline import LongCatVideoPipeline
    from atelier_runtime.networks.pixart_control import PixArtControlNetAdapterModel
    from atelier_runtime.networks.stable_cascade_encoder import EfficientNetEncoder
    from atelier_runtime.networks.stable_cascade_pipeline import StableCascadePipeline, StableCascadeUNet

__all__ = [
    "ACEStepPipeline",
    "ACEStepTransformer2DModel",
    "ADaMoSHiFiGANV1",
    "AuraFlowControlNetModel",
    "AuraFlowControlNetPipeline",
    "EfficientNetEncoder",
    "FluxKontextControlNetPipeline",
    "GranularEulerScheduler",
    "HiDreamImageControlNetModel",
    "HiDreamImageControlNetPipeline",
    "LongCatVideoPipeline",
    "LongCatVideoTransformer3DModel",
    "MusicDCAE",
    "PixArtControlNetAdapterModel",
    "PixArtSigmaControlNetPipeline",
    "StableCascadePipeline",
    "StableCascadeUNet",
]

_MODULES = {
    "ACEStepPipeline": "ace_step_v1_pipeline",
    "ACEStepTransformer2DModel": "ace_step_v1",
    "ADaMoSHiFiGANV1": "ace_step_v1_sound",
    "AuraFlowControlNetModel": "auraflow_control",
    "AuraFlowControlNetPipeline": "control_pipelines",
    "EfficientNetEncoder": "stable_cascade_encoder",
    "FluxKontextControlNetPipeline": "flux_kontext_control_pipeline",
    "GranularEulerScheduler": "ace_step_v1_pipeline",
    "HiDreamImageControlNetModel": "hidream_control",
    "HiDreamImageControlNetPipeline": "control_pipelines",
    "LongCatVideoPipeline": "longcat_video_pipeline",
    "LongCatVideoTransformer3DModel": "longcat_video",
    "MusicDCAE": "ace_step_v1_sound",
    "PixArtControlNetAdapterModel": "pixart_control",
    "PixArtSigmaControlNetPipeline": "control_pipelines",
    "StableCascadePipeline": "stable_cascade_pipeline",
    "StableCascadeUNet": "stable_cascade_pipeline",
}


def __getattr__(name: str) -> Any:
    """The class of that name (PEP 562); it is kept, so this is asked once for each."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return globals()[name]
