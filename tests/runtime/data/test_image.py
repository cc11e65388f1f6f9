import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

from atelier_runtime.data.buckets import Bucket, place
from atelier_runtime.data.image import UnreadableError, fit, read_picture


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def halves(left: tuple[int, ...], right: tuple[int, ...], mode: str = "RGB") -> Image.Image:
    """16 x 8, the left half of one colour and the right half of another."""
    picture = Image.new(mode, (16, 8), left)
    picture.paste(right, (8, 0, 16, 8))
    return picture


RED, BLUE = (250, 10, 20), (10, 20, 250)


def test_plain_pictures_are_read_as_they_are() -> None:
    picture = read_picture(encoded(halves(RED, BLUE)))
    assert picture.mode == "RGB"
    assert picture.getpixel((0, 0)) == RED
    assert picture.getpixel((15, 7)) == BLUE


@pytest.mark.parametrize(
    ("orientation", "size", "where_red"),
    [
        pytest.param(1, (16, 8), (0, 4), id="as it is"),
        pytest.param(2, (16, 8), (15, 4), id="mirrored"),
        pytest.param(3, (16, 8), (15, 4), id="half a turn"),
        pytest.param(6, (8, 16), (4, 0), id="quarter turn clockwise"),
        pytest.param(8, (8, 16), (4, 15), id="quarter turn counter-clockwise"),
    ],
)
def test_exif_rotation_is_applied(orientation: int, size: tuple[int, int], where_red: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = read_picture(encoded(halves(RED, BLUE), exif=exif))
    assert picture.size == size
    assert picture.getpixel(where_red) == RED


def test_transparent_pixels_become_white_and_half_transparent_ones_are_mixed_with_white() -> None:
    picture = read_picture(encoded(halves((255, 0, 0, 0), (0, 0, 0, 128), "RGBA")))
    assert picture.mode == "RGB"
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert picture.getpixel((15, 0)) == (127, 127, 127)


def test_grey_with_alpha_is_flattened_on_white() -> None:
    picture = read_picture(encoded(halves((0, 0), (60, 255), "LA")))
    assert [picture.getpixel((0, 0)), picture.getpixel((15, 0))] == [(255, 255, 255), (60, 60, 60)]


def test_palette_with_a_transparent_colour_is_flattened_on_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    assert read_picture(encoded(palette)).getpixel((1, 0)) == (200, 100, 50)
    flattened = read_picture(encoded(palette, transparency=0))
    assert [flattened.getpixel((0, 0)), flattened.getpixel((1, 0))] == [(255, 255, 255), (200, 100, 50)]


def test_rgb_with_a_transparent_colour_is_flattened_on_white() -> None:
    picture = read_picture(encoded(halves(RED, BLUE), transparency=RED))
    assert [picture.getpixel((0, 0)), picture.getpixel((15, 0))] == [(255, 255, 255), BLUE]


def test_cmyk_is_converted() -> None:
    picture = read_picture(encoded(halves((0, 255, 255, 0), (0, 0, 0, 0), "CMYK"), "TIFF"))
    assert picture.mode == "RGB"
    assert np.allclose(picture.getpixel((0, 0)), (255, 0, 0), atol=4)
    assert np.allclose(picture.getpixel((15, 0)), (255, 255, 255), atol=4)


def test_cmyk_jpegs_keep_light_and_dark() -> None:
    picture = read_picture(encoded(Image.new("CMYK", (16, 16), (0, 0, 0, 230)), "JPEG", quality=95))
    assert max(picture.getpixel((8, 8))) < 60


def test_sixteen_bit_grey_keeps_its_range() -> None:
    values = np.array([[0, 32768, 65535]], np.uint16)
    picture = read_picture(encoded(Image.fromarray(values)))
    assert [picture.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (128, 128, 128), (255, 255, 255)]


def test_floating_point_pictures_from_0_to_1_are_read_and_others_rejected() -> None:
    picture = read_picture(encoded(Image.fromarray(np.array([[0.0, 1.0]], np.float32)), "TIFF"))
    assert [picture.getpixel((0, 0)), picture.getpixel((1, 0))] == [(0, 0, 0), (255, 255, 255)]
    with pytest.raises(UnreadableError, match="outside 0 to 1"):
        read_picture(encoded(Image.fromarray(np.array([[0.0, 700.0]], np.float32)), "TIFF"))


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert np.allclose(read_picture(data).getpixel((3, 3)), RED, atol=3), kind


def swapped_red_and_green() -> bytes:
    """sRGB with the red and the green primary swapped: a profile whose effect cannot be overlooked."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    name = profile.index("sRGB built-in".encode("utf-16-be"))
    profile[name : name + 8] = "Xxxx".encode("utf-16-be")
    return bytes(profile)


def test_colours_go_through_the_embedded_profile() -> None:
    data = encoded(halves((255, 0, 0), (255, 255, 255)), icc_profile=swapped_red_and_green())
    picture = read_picture(data)
    assert np.allclose(picture.getpixel((0, 0)), (0, 255, 0), atol=6)
    assert np.allclose(picture.getpixel((15, 0)), (255, 255, 255), atol=2)


def test_transparency_survives_the_profile() -> None:
    data = encoded(halves((255, 0, 0, 255), (255, 0, 0, 0), "RGBA"), icc_profile=swapped_red_and_green())
    picture = read_picture(data)
    assert np.allclose(picture.getpixel((0, 0)), (0, 255, 0), atol=6)
    assert picture.getpixel((15, 0)) == (255, 255, 255)


def test_broken_profiles_are_ignored() -> None:
    assert read_picture(encoded(halves(RED, BLUE), icc_profile=b"no profile")).getpixel((0, 0)) == RED


def test_srgb_profiles_change_nothing() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert read_picture(encoded(halves(RED, BLUE), icc_profile=profile)).getpixel((0, 0)) == RED


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_truncated_files_are_rejected_with_a_reason(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8))
    data = encoded(noise, kind)
    with pytest.raises(UnreadableError, match=r"\w+"):
        read_picture(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"", b"this is text", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_files_that_are_no_pictures_are_rejected(data: bytes) -> None:
    with pytest.raises(UnreadableError):
        read_picture(data)


def test_decompression_bombs_are_rejected() -> None:
    header = PngImagePlugin.o32(100_000) + PngImagePlugin.o32(100_000) + b"\x08\x02\x00\x00\x00"
    file = io.BytesIO()
    file.write(b"\x89PNG\r\n\x1a\n")
    PngImagePlugin.putchunk(file, b"IHDR", header)
    PngImagePlugin.putchunk(file, b"IDAT", b"")
    with pytest.raises(UnreadableError, match="decompression bomb"):
        read_picture(file.getvalue())


def test_pixels_are_cut_where_the_placement_says_and_range_from_minus_one_to_one() -> None:
    wide = halves((0, 0, 0), (255, 255, 255))
    bucket = Bucket(8, 8)
    left = fit(wide, place(16, 8, bucket, (0.0, 0.0)))
    right = fit(wide, place(16, 8, bucket, (0.0, 0.999)))
    assert left.shape == (3, 8, 8)
    assert torch.equal(left, torch.full((3, 8, 8), -1.0))
    assert torch.equal(right, torch.full((3, 8, 8), 1.0))


def test_resizing_keeps_height_and_width_apart() -> None:
    picture = Image.new("RGB", (40, 20))
    assert fit(picture, place(40, 20, Bucket(24, 16))).shape == (3, 16, 24)
