"""Tests of ``workers.process.control``."""
