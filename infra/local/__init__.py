"""Helpers of the Makefile, which run before anything is installed."""
