"""Tests of ``workers.kv``."""
