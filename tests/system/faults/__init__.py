"""Tests of clusters that lose parts: no client notices, or each gets one named error."""
