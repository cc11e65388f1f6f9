"""How a base checkpoint comes to this machine: from the hub, or from an S3-compatible store. `atelier_runtime.prefetch` chooses."""
