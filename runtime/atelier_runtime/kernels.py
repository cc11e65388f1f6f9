"""Which of torch's kernels may run, where its own choice is known to fail."""

import os

import torch


def choose_attention() -> None:
    """Keep `scaled_dot_product_attention` of this process from cuDNN: flash attention runs instead, where there is no mask.

    Torch prefers cuDNN on Hopper. With torch 2.11 on an H200 its backward pass ended the first step of a Flux LoRA in an illegal
    memory access, which no restart cures (decision 0015).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def choose_adapters() -> None:
    """Let lycoris-lora compute with torch's own operations, unless the environment names others.

    By itself it takes Triton kernels of its own on a GPU, and `torch.compile`, which needs a C compiler, for what they cannot do. Of
    neither is known here that two runs give the same bits, or that they are faster.
    """
    os.environ.setdefault("LYCORIS_KERNEL_BACKEND", "torch")
