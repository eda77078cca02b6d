"""One module a command: its wiring, and what is printed. `options` holds what commands share.

Each module with a command holds it under the module's own name. jax and numpy are imported only
inside functions, so that `--help` and `grokfetch fetch` never pay for them.
"""
