"""Tensors in their files, and arithmetic over them: which bytes, for which device. No jax here."""
