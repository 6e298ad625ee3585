"""Tests of ``cluster.controller.parts``."""
