"""Tests of ``cluster.planner``."""
