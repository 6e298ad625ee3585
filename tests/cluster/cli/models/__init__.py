"""Tests of ``cluster.cli.models``."""
