"""Tests of ``workers.model``."""
