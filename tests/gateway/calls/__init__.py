"""Tests of ``gateway.calls``."""
