"""Tests against one real server: what its users see, and what they must not be able to break."""
