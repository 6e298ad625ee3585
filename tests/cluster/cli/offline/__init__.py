"""Tests of ``cluster.cli.offline``."""
