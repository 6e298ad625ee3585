"""This server beside vLLM, transformers and llama.cpp: ``python -m benchmarks.peers``."""
