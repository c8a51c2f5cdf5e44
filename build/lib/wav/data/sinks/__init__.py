"""Sinks of demonstrations: one writer per format of others, from an episode store."""
