"""Settings of the whole suite: one thread per process, no network, no chatter of the libraries."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for processes that tests start

try:
    import torch
except ImportError:  # the API, planner and command line are tested without torch as well
    pass
else:
    torch.set_num_threads(1)
