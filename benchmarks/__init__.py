"""What ``RESULTS.md`` is made with. May import every package, and transformers as a base line."""
