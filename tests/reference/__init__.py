"""What answers are compared with: one process, goldens by transformers, random configs."""
