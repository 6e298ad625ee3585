"""Tests of whole clusters: real workers with a real gateway, in this process or in Ray."""
