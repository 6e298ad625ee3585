"""Tests of ``system.faults``."""
