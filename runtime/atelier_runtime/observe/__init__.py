"""What a run tells about itself: metrics, progress, failures, logs, the report. Importing this imports no torch."""
