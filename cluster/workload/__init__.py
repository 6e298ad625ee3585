"""Requests of a workload with their times, and statistics of their outcome. Pure.

Imports numpy only.
"""
