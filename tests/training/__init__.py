"""Tests of wav.training."""
