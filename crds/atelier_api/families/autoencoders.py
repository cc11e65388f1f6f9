"""What autoencoders that several families share hold of a sample. Sounds count samples in time, pictures and clips pixels."""

from atelier_api.families.facts import Passage, Passages

CAUSAL_STILL = Passages(Passage(971, tile=256), Passage(1735, tile=256))
"""Wan's and Qwen-Image's, of one frame."""

CAUSAL = Passages(Passage(1260, frames=3, tile=256), Passage(1735, frames=3, tile=256))
"""Wan's, which goes through a clip by four frames and keeps what it needs of those before."""
