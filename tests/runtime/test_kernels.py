"""Kernels that are known to fail are not chosen."""

import torch

from atelier_runtime.kernels import choose_attention


def test_attention_is_kept_from_cudnn_and_not_from_flash() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        choose_attention()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
