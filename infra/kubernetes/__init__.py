"""Kubernetes: manifests (docs/kubernetes.md) and the launcher of trainings over several nodes."""
