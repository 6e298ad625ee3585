"""Tests of ``workers.lora``."""
