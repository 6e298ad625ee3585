"""Tests of ``workers.sampling``."""
