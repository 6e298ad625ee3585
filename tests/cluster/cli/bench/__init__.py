"""Tests of ``cluster.cli.bench``."""
