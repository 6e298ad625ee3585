"""Tests of ``gateway.generation``."""
