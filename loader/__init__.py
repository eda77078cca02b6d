"""Grok-1 checkpoints as named tensors, and the JAX model that runs them.

Importing this package imports nothing heavy; its modules say what they need.
"""
