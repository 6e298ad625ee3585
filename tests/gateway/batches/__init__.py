"""Files and batches of a gateway."""
