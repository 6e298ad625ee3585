"""Tests of ``workers.scheduling``."""
