"""A real Kubernetes cluster on one machine, for development and tests: see docs/how-to/develop-on-a-real-cluster.md."""
