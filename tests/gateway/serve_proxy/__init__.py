"""Tests of ``gateway.serve_proxy``."""
