"""From the Grok-1 magnet link to tokens: fetch, verify, load, run."""

__version__ = "0.1.0"
