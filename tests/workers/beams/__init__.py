"""Tests of ``workers.beams``."""
