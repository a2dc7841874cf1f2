"""Noisy in-context recall: a small transformer whose last MLP learns the noise, and can lose it again."""
