"""Tests of ``workers.metrics``."""
