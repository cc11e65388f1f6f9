"""Pictures: read with Pillow into upright sRGB without alpha, fitted to a bucket, as pixels in [-1, 1].

Files in the wild are rotated by EXIF, transparent, CMYK, palettes, 16 bits deep, in wide-gamut colour spaces, cut short.
Whatever can be shown faithfully is; the rest raises UnreadableError with a reason for people.
"""

import io

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from atelier_runtime.data.buckets import Placement

_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


class UnreadableError(Exception):
    """A file that cannot be used; the text says why."""


def read_picture(content: bytes) -> Image.Image:
    """The (first) picture in the bytes of a file: RGB, upright, sRGB, transparency on white. Raises UnreadableError."""
    try:
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()  # an animation is at its first frame
            profile = picture.info.get("icc_profile")
            upright = ImageOps.exif_transpose(picture)
            return _on_white(_to_srgb(_eight_bits(upright), profile))
    except UnreadableError:
        raise
    except UnidentifiedImageError as error:  # whose own words name an object in memory
        raise UnreadableError("no picture of a known format") from error
    except Exception as error:  # decoders raise nearly anything on damaged files: OSError, SyntaxError, struct.error …
        raise UnreadableError(str(error) or type(error).__name__) from error


def fit(picture: Image.Image, placement: Placement) -> Tensor:
    """Pixels [3, H, W] in [-1, 1] of the picture resized and cut as `placement` says."""
    return torch.from_numpy(np.array(fitted(picture, placement))).permute(2, 0, 1).to(torch.float32) / 127.5 - 1.0


def fitted(picture: Image.Image, placement: Placement) -> Image.Image:
    """The picture resized and cut as `placement` says (Lanczos filter)."""
    height, width = placement.resized
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    left, top = placement.left, placement.top
    return picture.crop((left, top, left + placement.bucket.width, top + placement.bucket.height))


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Brings modes with deep single channels to 8 bits; others are given back as they are."""
    if picture.mode == "F":
        values = np.asarray(picture)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise UnreadableError("floating-point picture with values outside 0 to 1")
        return Image.fromarray(np.round(values * 255).astype(np.uint8))
    if picture.mode.startswith("I"):
        deep = np.asarray(picture)
        if deep.min() < 0 or deep.max() > 65535:
            raise UnreadableError("integer picture with values outside 0 to 65535")
        return Image.fromarray(np.round(deep / 257).astype(np.uint8))
    return picture


def _to_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """The picture as RGB or RGBA in sRGB, through its colour profile where it has a usable one."""
    transparent = "A" in picture.mode or "a" in picture.mode or "transparency" in picture.info
    target = "RGBA" if transparent else "RGB"
    if profile is not None and (picture.mode in ("CMYK", "L") and not transparent):
        converted = _through_profile(picture, profile, "RGB")
        if converted is not None:
            return converted
    if picture.mode == "LAB":
        lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        return _transformed(picture, lab, "RGB")
    plain = picture if picture.mode == target else picture.convert(target)
    if profile is None:
        return plain
    return _through_profile(plain, profile, target) or plain


def _through_profile(picture: Image.Image, profile: bytes, mode: str) -> Image.Image | None:
    """The picture transformed to sRGB; None for a profile that is broken or made for another kind of picture."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if mode == picture.mode and ImageCms.getProfileDescription(source).startswith("sRGB"):
            return picture
        return _transformed(picture, source, mode)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None


def _transformed(picture: Image.Image, source: ImageCms.ImageCmsProfile, mode: str) -> Image.Image:
    result = ImageCms.profileToProfile(picture, source, _SRGB, outputMode=mode)
    if result is None:
        raise UnreadableError("its colour profile gave no picture")
    return result


def _on_white(picture: Image.Image) -> Image.Image:
    if picture.mode != "RGBA":
        return picture
    canvas = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return Image.alpha_composite(canvas, picture).convert("RGB")
