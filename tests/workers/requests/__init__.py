"""Tests of ``workers.requests``."""
