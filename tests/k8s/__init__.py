"""Manifests of k8s/, checked without a cluster."""
