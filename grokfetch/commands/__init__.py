"""One module a command: its options, the wiring, and what is printed.

Only these modules import `loader`, and only inside functions, so that `grokfetch --help` and
`grokfetch fetch` never pay for jax. Each but `swarm_options` holds a click
command named like the module.
"""
