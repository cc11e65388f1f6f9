"""What Stable Diffusion XL takes for an empty caption."""

import pytest
import torch

from atelier_runtime.families import get_family
from family_models import tiny_pipeline

FAMILY = get_family("sdxl")


@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "encoded"])
@torch.no_grad()
def test_the_empty_caption_is_the_unconditional_text_of_the_pipeline(zeros: bool) -> None:
    pipe = tiny_pipeline("sdxl")
    pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    prompted, empty = FAMILY.encode_text(pipe, ["a fox", ""])
    expected, unconditional, pooled, unconditional_pooled = pipe.encode_prompt("a fox")
    torch.testing.assert_close(empty["embeds"], unconditional[0])
    torch.testing.assert_close(empty["pooled"], unconditional_pooled[0])
    assert bool(empty["embeds"].any()) != zeros
    torch.testing.assert_close(prompted["embeds"], expected[0])
    torch.testing.assert_close(prompted["pooled"], pooled[0])
