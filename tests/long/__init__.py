"""Tests of minutes to hours, each ``python -m tests.long.NAME``; pytest collects none of them."""
