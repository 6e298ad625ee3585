"""Tests of ``cluster.policy``."""
