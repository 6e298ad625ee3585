"""Tests of ``cluster.actors``."""
