"""Training: three flow-matching stages through one DeepSpeed loop that can be killed at any moment and goes on.

``objectives`` holds the stages' losses, ``engine`` DeepSpeed, ``loop`` the run itself (``python -m wav.training.loop
SPEC.json``), ``checkpoint`` and ``ema`` its state, ``spec`` what a run is given and ``launch`` its process group.
"""

#: Names the file through which the ranks of one machine meet; what another launcher starts has MASTER_ADDR instead.
RENDEZVOUS = "WAV_RENDEZVOUS_FILE"
