"""Tests of ``workers.process``."""
