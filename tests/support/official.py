"""The class that the official shards name, as the program that wrote them had it."""

import dataclasses


@dataclasses.dataclass
class QuantizedWeight8bit:
    weight: object
    scales: object


QuantizedWeight8bit.__module__ = "__main__"
