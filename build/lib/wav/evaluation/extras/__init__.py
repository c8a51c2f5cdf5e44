"""Evaluation beside the pipeline: LIBERO's table, replay, reruns, first frames."""
