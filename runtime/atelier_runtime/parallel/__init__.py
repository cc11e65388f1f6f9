"""The process group, and a denoiser spread over it."""

from atelier_runtime.parallel.distributed import Distributed, start, stop
from atelier_runtime.parallel.wrap import full_state, micro_batch, shards_weights, unwrap, wrap
from atelier_runtime.parallel.zero import Partitioned

__all__ = [
    "Distributed",
    "Partitioned",
    "full_state",
    "micro_batch",
    "shards_weights",
    "start",
    "stop",
    "unwrap",
    "wrap",
]
