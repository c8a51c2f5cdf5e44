"""Episodes on disk and in memory: format, statistics and training windows."""
