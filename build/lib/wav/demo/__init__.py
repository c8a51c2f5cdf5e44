"""One page beside a running simulator that shows what a policy imagines before it acts: ``wav demo EXPORT``."""
