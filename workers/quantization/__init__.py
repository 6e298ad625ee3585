"""Quantized weights (8 and 4 bits): formats, quantization and dequantization.

Imports torch and ``cluster.core``; ``formats`` imports no torch.
"""
