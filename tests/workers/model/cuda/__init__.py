"""Tests of ``workers.model.cuda``."""
