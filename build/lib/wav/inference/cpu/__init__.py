"""Backend ``cpu``: fused blocks on kernels in C, for float32 on a processor with wide vectors."""
