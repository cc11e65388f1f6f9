"""The objects of a run, as plain manifests: one module per kind, run and settings in, manifest out. Pure."""

from atelier_operator.desired.config_map import config_map
from atelier_operator.desired.job import job
from atelier_operator.desired.jobset import jobset
from atelier_operator.desired.order import Order
from atelier_operator.desired.service import service

__all__ = ["Order", "config_map", "job", "jobset", "service"]
