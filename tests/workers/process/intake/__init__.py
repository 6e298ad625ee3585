"""Tests of ``workers.process.intake``."""
