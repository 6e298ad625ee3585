"""Tests of ``workers.quantization``."""
