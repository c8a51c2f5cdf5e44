"""Latent planning: the paper's Algorithm 1."""
