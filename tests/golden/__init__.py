"""Parity with the reference implementation."""
