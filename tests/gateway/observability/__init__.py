"""Tests of ``gateway.observability``."""
