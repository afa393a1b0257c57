"""OneRec in JAX: semantic IDs, a four-pathway encoder, an MoE decoder, rewards and beam search.

Importing the package is light: tables (Polars), input pipelines (Grain) and command lines (tyro)
load only when the modules that use them do.
"""

__version__ = "0.1.0"
