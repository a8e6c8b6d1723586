"""Training: one loop, objectives that see only scores, strategies that see only a model."""
