"""Tests of ``cluster.cli.cluster``."""
