"""Tests of ``cluster.cli.options``."""
