"""Tests of wav.io.storage."""
