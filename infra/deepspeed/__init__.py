"""What DeepSpeed is given at the paper's size: ``zero1.json`` to ``zero3.json``, for reading and for comparison.

Training makes the same from the parameters (:func:`wav.training.engine.deepspeed_config`); nothing reads these files.
``python -m infra.deepspeed`` writes them again. What is set, and why (DeepSpeed 0.19.8):

- ``reduce_bucket_size``: as many elements as are trained, at most DeepSpeed's 500 million, set when a run starts. The
  buffer is allocated whole at every step, a gigabyte in bf16, also for the few parameters of the value stage.
- ``overlap_comm``: off on one rank and on a CPU. There is nothing to reduce, and it would take a second buffer and
  another stream; ZeRO 3 has it on by itself.
- ``contiguous_gradients``: off on one rank. It copies every gradient into the buffer and out of it again; without it a
  step of ZeRO 1 and 2 launches a copy less for each trained tensor, 7% fewer kernels in all (counted at the tiny size).
- ``gradient_clipping``: 0 at ZeRO 0 in float32, where :mod:`wav.training.step` clips with the norm it needs anyway.
- The look for overflow in bf16 (``check_grad_overflow``) stays on, because the norm is only judged where it is, but the
  pass over all gradients that comes before the norm is left out: it finds what the norm finds.
- On one rank ZeRO 1 and 2 neither exchange gradients nor take their norms one by one in float64
  (:func:`wav.training.engine.leave_out_exchange`): 26 of 330 ms of a step at the paper's size on one card.
- bf16 on one card: ZeRO 1 or 2, whose optimiser works on one flat float32 copy. ZeRO 0 goes from tensor to tensor: it
  launches twice as many kernels and takes a number to the host for each trained tensor, at which a GPU is waited for.
"""
