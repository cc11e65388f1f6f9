import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atelier_api.families import FAMILIES
from atelier_api.v1alpha1.data import Data
from atelier_runtime.data.buckets import Bucket, alignment, bucket_for, enlargement, place, place_sound


def data(**fields: object) -> Data:
    return Data.model_validate({"sources": [{"uri": "pictures"}], **fields})


@pytest.mark.parametrize(
    ("width", "height", "resolution", "align", "expected"),
    [
        pytest.param(1024, 1024, 1024, 64, (1024, 1024), id="square"),
        pytest.param(4000, 3000, 1024, 64, (1152, 896), id="4:3"),
        pytest.param(3000, 4000, 1024, 64, (896, 1152), id="3:4 has the edges swapped"),
        pytest.param(1920, 1080, 1024, 64, (1344, 768), id="16:9"),
        pytest.param(1920, 1080, 1024, 16, (1360, 768), id="16:9 finer"),
        pytest.param(6000, 4000, 512, 64, (640, 448), id="3:2 at 512"),
        pytest.param(1000, 1000, 1000, 64, (1024, 1024), id="the square's edge is rounded first"),
        pytest.param(640, 480, 32, 16, (32, 32), id="at 32 by 16 a 4:3 picture is square"),
        pytest.param(100, 40, 32, 16, (48, 16), id="small and wide"),
        pytest.param(20000, 50, 512, 64, (10240, 64), id="no edge is under the alignment"),
        pytest.param(1, 1000, 64, 8, (8, 640), id="aspects are at least 0.01"),
    ],
)
def test_buckets_have_the_area_of_the_resolution_and_the_aspect_of_the_picture(
    width: int, height: int, resolution: int, align: int, expected: tuple[int, int]
) -> None:
    bucket = bucket_for(width, height, resolution, align)
    assert (bucket.width, bucket.height) == expected


def test_aspects_that_round_to_the_same_two_decimals_share_a_bucket() -> None:
    assert bucket_for(1000, 751, 1024, 8) == bucket_for(1000, 752, 1024, 8)
    assert bucket_for(1000, 740, 1024, 8) != bucket_for(1000, 760, 1024, 8)


def test_clips_of_other_lengths_are_in_other_buckets() -> None:
    assert bucket_for(100, 100, 64, 16, frames=5) != bucket_for(100, 100, 64, 16, frames=9)


@given(
    width=st.integers(1, 20_000),
    height=st.integers(1, 20_000),
    resolution=st.integers(16, 4096),
    align=st.sampled_from([8, 16, 32, 64]),
    draw=st.none() | st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)),
)
def test_every_picture_covers_its_bucket_after_resizing(
    width: int, height: int, resolution: int, align: int, draw: tuple[float, float] | None
) -> None:
    bucket = bucket_for(width, height, resolution, align)
    assert bucket.width % align == 0
    assert bucket.height % align == 0
    placement = place(width, height, bucket, draw)
    resized_height, resized_width = placement.resized
    assert 0 <= placement.top <= resized_height - bucket.height
    assert 0 <= placement.left <= resized_width - bucket.width
    # Only one direction has pixels to cut; the other fits, so the aspect is kept to within a pixel.
    assert resized_height == bucket.height or resized_width == bucket.width
    scale = enlargement(width, height, bucket)
    assert abs(resized_height - height * scale) <= 0.5 + 1e-6
    assert abs(resized_width - width * scale) <= 0.5 + 1e-6


def test_sizes_are_resized_crop_and_target_height_before_width() -> None:
    placement = place(200, 100, Bucket(64, 64), None)
    assert placement.sizes == (64, 128, 0, 32, 64, 64)


@pytest.mark.parametrize(
    ("samples", "length", "bucket"),
    [
        pytest.param(1000, 1000, 1000, id="a bucket whole"),
        pytest.param(1001, 1000, 1000, id="less than a unit too many"),
        pytest.param(1010, 1010, 1500, id="a unit too many"),
        pytest.param(2900, 2400, 2400, id="longer than anything that is used"),
        pytest.param(2300, 2300, 2400, id="the last bucket"),
    ],
)
def test_a_sound_keeps_whole_units_in_the_next_larger_bucket(samples: int, length: int, bucket: int) -> None:
    placement = place_sound(samples, unit=10, step=500, most=2400)
    assert (placement.length, placement.bucket) == (length, Bucket(1, 1, bucket))


def test_random_crops_reach_both_ends() -> None:
    lefts = {place(200, 100, Bucket(64, 64), (0.0, i / 1000)).left for i in range(1000)}
    assert lefts == set(range(65))


@pytest.mark.parametrize(
    ("family", "resolution", "explicit", "expected"),
    [
        pytest.param("sdxl", 1024, None, 64, id="64 by default"),
        pytest.param("sdxl", 512, None, 64, id="64 from 512 on"),
        pytest.param("sdxl", 511, None, 8, id="the family's multiple below 512"),
        pytest.param("sdxl", 1024, 8, 8, id="explicit"),
    ],
)
def test_alignment_is_the_spec_or_64_or_the_familys_multiple(
    family: str, resolution: int, explicit: int | None, expected: int
) -> None:
    assert alignment(data(resolution=resolution, bucketAlign=explicit), FAMILIES[family]) == expected


def test_alignment_that_the_family_cannot_take_is_a_bug_as_the_rules_refuse_it() -> None:
    facts = FAMILIES["sd3"]
    assert math.gcd(facts.pixel_multiple, 8) == 8
    with pytest.raises(ValueError, match=r"spec.data.bucketAlign is 8, no multiple of 16"):
        alignment(data(bucketAlign=8), facts)
