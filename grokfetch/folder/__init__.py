"""The checkpoint directory: its state files, what is proven in it, and what is found wrong."""
