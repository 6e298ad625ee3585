"""Tests of ``gateway.http``."""
