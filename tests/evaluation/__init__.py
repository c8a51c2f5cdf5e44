"""Tests of wav.evaluation."""
