"""Checkpoints: saved beside the training, committed by a manifest that is written last, verified before they are loaded."""

from atelier_runtime.checkpoint.manifest import Manifest
from atelier_runtime.checkpoint.messages import SaveOutcome
from atelier_runtime.checkpoint.resume import Refusal, ResumePoint, resume
from atelier_runtime.checkpoint.save import Checkpointer
from atelier_runtime.checkpoint.writer_process import WriterProcess

__all__ = ["Checkpointer", "Manifest", "Refusal", "ResumePoint", "SaveOutcome", "WriterProcess", "resume"]
