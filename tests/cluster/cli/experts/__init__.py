"""Tests of ``cluster.cli.experts``."""
