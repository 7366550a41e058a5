"""Cutting a causal LM in bottom, trunk and top; the only place that names transformers' internals."""
