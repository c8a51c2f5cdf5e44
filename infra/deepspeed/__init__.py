"""DeepSpeed's configurations at the paper's size, which README.md explains."""
