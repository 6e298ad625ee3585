"""Tests of ``gateway.anthropic``, and of its routes."""
