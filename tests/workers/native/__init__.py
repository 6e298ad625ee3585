"""Tests of ``workers.native``."""
