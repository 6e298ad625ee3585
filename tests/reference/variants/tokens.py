"""Numbers of the tiny tokenizer."""

VOCAB = 512
PAD, BOS, EOS = 0, 1, 2
