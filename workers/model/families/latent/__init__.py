"""Families with latent attention: DeepSeek-V2, DeepSeek-V3, Kimi K2 and GLM-4.7-Flash.

May import the same packages as ``families``.
"""
