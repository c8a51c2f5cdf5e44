"""Tests of wav.storage."""
