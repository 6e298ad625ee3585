"""The commands below ``bench``: how fast a server, the engine and the data plane are.

A module a command. Only those that compute themselves import torch, and only when they run.
"""
