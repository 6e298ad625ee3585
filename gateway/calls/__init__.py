"""Runs validated calls: admission, prompts, submission to engines, outputs and traces.

Imports ``gateway.engines``, ``observability`` and the layers below, and ``cluster.tracing``.
"""
