"""Tests of ``gateway.text``."""
