"""The class that the official shards refer to, as in the program that wrote them."""

import dataclasses


@dataclasses.dataclass
class QuantizedWeight8bit:
    weight: object
    scales: object


QuantizedWeight8bit.__module__ = "__main__"
