"""Tests of ``workers.experts``."""
