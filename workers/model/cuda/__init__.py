"""A model on a GPU: attention, attention halves, and the device itself."""
