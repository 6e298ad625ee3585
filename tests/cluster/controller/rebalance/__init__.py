"""Tests of ``cluster.controller.rebalance``."""
