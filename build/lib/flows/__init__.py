"""One Prefect flow per stage: ``python -m flows.<stage>`` is the command of the DVC stage of that name.

A flow reads the settings, calls the library and publishes what came out; there is no mathematics here.
"""
