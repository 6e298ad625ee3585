"""Tests of ``cluster.controller.drain``."""
