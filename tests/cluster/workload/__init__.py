"""Tests of ``cluster.workload``."""
