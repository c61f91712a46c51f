"""Quantization of one array: rounding, scales, groups, estimators, and `QArray`."""
