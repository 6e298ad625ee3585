"""Tests of ``cluster.disk``."""
