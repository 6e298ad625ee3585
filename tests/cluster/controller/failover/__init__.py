"""Tests of ``cluster.controller.failover``."""
