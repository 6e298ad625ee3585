"""Tests of ``gateway.text.schemas``."""
