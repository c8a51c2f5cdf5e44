"""Simulators: what an episode is (env), the tabletop suite, its scripted expert, and processes to run them in.

Nothing here imports torch: a simulator process stays small and never shares a CUDA context.
"""
