"""One module per command: its wiring and its output. `options` holds what commands share.

A command has the name of its module. jax and numpy are imported only inside functions, so that
`--help` and `grokfetch fetch` never wait for them.
"""
