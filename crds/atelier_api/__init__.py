"""The types that the operator, the runtime and the command line share. Imports nothing but pydantic (and PyYAML for reading files)."""

API_VERSION = "atelier.dev/v1alpha1"
