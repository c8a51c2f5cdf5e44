"""The tabletop suite: scripted tasks of one arm in robosuite."""
