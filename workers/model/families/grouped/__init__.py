"""Families with grouped-query attention: the query heads of a group share keys and values.

They include multi-head attention, with groups of one query head. May import the same packages as
``families``.
"""
