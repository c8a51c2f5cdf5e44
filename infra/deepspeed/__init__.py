"""What DeepSpeed is given at the paper's size: ``zero1.json`` to ``zero3.json``, for reading and for comparison.

Training makes the same from the parameters (:func:`wav.training.engine.deepspeed_config`); nothing reads these files.
``python -m infra.deepspeed`` writes them again.
"""
