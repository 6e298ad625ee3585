"""Tests of ``gateway.offload``."""
