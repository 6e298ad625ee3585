"""Served clusters: tokens a second, latency, and what an option or the gateway costs."""
