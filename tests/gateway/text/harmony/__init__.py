"""Tests of ``gateway.text.harmony``."""
