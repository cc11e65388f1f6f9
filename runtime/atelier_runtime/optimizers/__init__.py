"""Optimizer, learning-rate schedule, gradient clipping and moving average; all of them take sharded parameters."""

from atelier_runtime.optimizers.adamw import build_optimizer
from atelier_runtime.optimizers.clip import clip_gradients
from atelier_runtime.optimizers.ema import Ema
from atelier_runtime.optimizers.schedule import learning_rate_at

__all__ = ["Ema", "build_optimizer", "clip_gradients", "learning_rate_at"]
