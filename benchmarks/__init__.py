"""What ``RESULTS.md`` is made with. May import every package and, for its base line, transformers."""
