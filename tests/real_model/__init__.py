"""A real trained model, served as a mixture of experts, against transformers: ``maker`` says how."""
