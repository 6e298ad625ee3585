"""Tests of ``cluster.launch``."""
