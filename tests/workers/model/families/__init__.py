"""Tests of ``workers.model.families``."""
