"""Tests of ``cluster.load``."""
