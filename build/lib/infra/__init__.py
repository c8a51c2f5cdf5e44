"""What runs around the library: local services here; containers, units and policies for servers beside it."""
