"""What turns a model into what the planner needs."""
