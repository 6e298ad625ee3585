"""Tests of ``workers.inspection``."""
