"""Tests of the package for Python programs."""
