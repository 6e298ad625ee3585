"""Tests of ``gateway.text.forms``."""
