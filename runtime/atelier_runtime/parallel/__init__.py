"""The process group, and a denoiser spread over it."""

from atelier_runtime.parallel.distributed import Distributed, start, stop
from atelier_runtime.parallel.wrap import full_state, no_sync, unwrap, wrap

__all__ = ["Distributed", "full_state", "no_sync", "start", "stop", "unwrap", "wrap"]
