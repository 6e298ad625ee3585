"""Tests of ``gateway.listener``."""
