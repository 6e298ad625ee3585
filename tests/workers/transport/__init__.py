"""Tests of ``workers.transport``."""
