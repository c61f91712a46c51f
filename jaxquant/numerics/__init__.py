"""How one array is quantized: rounding, scales, groups, estimators, and the `QArray` of the result."""
