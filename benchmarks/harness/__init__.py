"""Clusters, servers, engines and clients that tests and benchmarks start. Imports no test."""
