"""A real trained model as a mixture of experts, against transformers."""
