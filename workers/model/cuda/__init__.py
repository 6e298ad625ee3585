"""Parts of a model on a GPU: attention, attention sublayers, and properties of the device."""
