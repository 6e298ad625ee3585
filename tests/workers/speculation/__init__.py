"""Tests of ``workers.speculation``."""
