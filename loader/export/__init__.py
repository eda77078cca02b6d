"""A proven checkpoint in the file formats of other engines, and back again. No jax here."""
