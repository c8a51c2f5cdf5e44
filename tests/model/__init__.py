"""Tests of wav.model."""
