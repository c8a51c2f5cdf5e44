"""LIBERO's suites: tasks, assets, environment and scripted expert."""
