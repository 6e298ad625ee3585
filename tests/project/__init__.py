"""Tests of ``project``."""
