"""Tests of ``cluster.sizing``."""
