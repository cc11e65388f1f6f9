"""`TrainingRun` in version v1alpha1: one module per block of the spec."""

from atelier_api.v1alpha1.training_run import Metadata, TrainingRun, TrainingRunSpec

__all__ = ["Metadata", "TrainingRun", "TrainingRunSpec"]
