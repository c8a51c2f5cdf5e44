"""The schedules that the benchmarks compare with: what the published reference computes, redundancy included."""
