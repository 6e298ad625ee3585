"""Hosts that are network namespaces of this machine, and what runs on them."""
