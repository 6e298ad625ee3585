"""How the bundled demo checkpoint was trained: corpus, training, model card, served load."""
