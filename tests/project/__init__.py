"""Tests of the repository: documents, README, release, layout, setup."""
