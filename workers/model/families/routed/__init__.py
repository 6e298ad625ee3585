"""Families whose attention is itself a mixture of experts, chosen by a router for each token.

May import what families may.
"""
