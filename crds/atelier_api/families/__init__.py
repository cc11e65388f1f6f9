"""The model families, each a module of its name here and one in the runtime. A family is registered by its name in this list."""

from importlib import import_module

from atelier_api.families.facts import FamilyFacts, Flavour, Vocabulary

__all__ = ["FAMILIES", "NAMES", "FamilyFacts", "Flavour", "Vocabulary"]

NAMES = (
    *("sd3", "flux", "sdxl", "z_image", "wan"),
    *("pixart_sigma", "sana", "ltx", "kandinsky5_video", "kandinsky5_image"),
    "qwen_image",
    "longcat_image",
    "hidream",
    "hunyuan_video15",
    "longcat_video",
    "wan_ti2v",
    "flux_kontext",
    "chroma",
    "auraflow",
    "flux2",
    "lumina2",
    "cosmos2",
    "omnigen",
    "kolors",
    "longcat_video_edit",
    "ltx_i2v",
    "ace_step",
    "qwen_image_edit",
    "longcat_image_edit",
    "stable_cascade",
    "sd15",
    "ace_step_v1",
)

FAMILIES: dict[str, FamilyFacts] = {name: import_module(f"{__name__}.{name}").FACTS for name in NAMES}
