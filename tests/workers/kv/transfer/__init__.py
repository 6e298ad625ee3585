"""Tests of ``workers.kv.transfer``."""
