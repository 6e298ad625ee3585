"""Families whose query heads share the keys and values of a group: grouped-query attention.

Multi-head attention is the group of one query head. May import what families may.
"""
