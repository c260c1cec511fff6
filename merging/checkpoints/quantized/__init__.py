"""Quantized inputs, dequantized to fp32 while they are read: one module per format, no merging and no writing."""
