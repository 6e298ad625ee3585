"""A model on a GPU: attention, attention sublayers, and the device."""
