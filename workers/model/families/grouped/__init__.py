"""Families with grouped-query attention: the query heads of a group share keys and values.

Multi-head attention has groups of one query head. May import the same packages as ``families``.
"""
