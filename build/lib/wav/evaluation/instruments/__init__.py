"""What the noises decide and whether scores rank futures as reality does: instruments beside success rates.

Success alone cannot tell a planner that chooses from one that merely lowers the temperature. Each instrument is a file
and a section of metrics.json; :mod:`wav.evaluation.tables` puts them into sentences.

    use        share of the action's and of the return's variance that each noise explains
    swap       does the action follow the future and the values that it is shown, where they are another's
    oracle     error of the action given the true future and values, given imagined ones, given none
    futures    how far apart the futures of like states are, so whether there is anything to choose
    ranking    do scores rank candidates as executing them does, and does searching harder pay
"""

#: Sections of metrics.json.
INSTRUMENTS = ("use", "swap", "oracle", "futures", "ranking")
