"""Tests of ``gateway.auth``."""
