"""Tests of ``workers.model.batch_invariant``."""
