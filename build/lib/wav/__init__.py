"""wav: the World-Value-Action model (arXiv 2604.14732) as a library.

The package knows nothing of Prefect or DVC; ``flows/`` calls it. Rooms are described in docs/architecture.md.
"""

__version__ = "0.1.0"
