"""Closed-loop evaluation: which episodes, rollouts, records and metrics, pictures, the report.

The suite evaluated is ``data.suite`` (tabletop by default, not LIBERO); it stands in every table, title and file name.
"""
