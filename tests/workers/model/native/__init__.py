"""Tests of ``workers.model.native``."""
