"""Tests of ``cluster.simulation``."""
