"""Tests of ``cluster.cli``."""
