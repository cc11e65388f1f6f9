"""The admission webhook: says at `kubectl apply` what the operator would say of a run in its status.

A comfort, not a judge: whatever goes wrong here, the run is let in, and the operator judges it (docs/decisions/0013).
"""
