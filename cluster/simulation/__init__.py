"""Simulations of a serving cluster in virtual time, with the product's own scheduling code.

Imports ``cluster.sizing``, ``cluster.workload``, and of the workers and the gateway what needs no
torch.
"""
