"""Measurements: they write ``docs/results``. They may import every package, and
transformers as a baseline.
"""
