"""Tests of ``workers.experts.transfer``."""
