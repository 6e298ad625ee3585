"""Checkpoints that are made for a measurement: random weights, tokenizers, number formats."""
