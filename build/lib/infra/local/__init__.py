"""One machine's services (Prefect, S3) and helpers of the Makefile."""
