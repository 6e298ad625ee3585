"""Tests of ``gateway.core``."""
