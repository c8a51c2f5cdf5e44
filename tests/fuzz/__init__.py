"""Generated bad input: thousands of small cases, each of which must end well or in one sentence.

Every test has a slice that always runs, and the whole count in blocks with the mark ``long`` (``make check-long``);
``--seed N`` makes other cases. What a case may do: work and give the right values, or raise a
:class:`wav.errors.WavError` whose message is one line. A traceback, a message without bounds, or a wrong value that is
accepted in silence is a failure, which names the case's number; :func:`tests.fuzz.tally.Tally` keeps the counts.
"""
