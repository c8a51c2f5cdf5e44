"""Observations in, action chunks out: the policy, and the folder it is exported to and loaded from."""

from wav.policy.policy import Observation, PlanSummary, Policy, PolicyOutput

__all__ = ["Observation", "PlanSummary", "Policy", "PolicyOutput"]
