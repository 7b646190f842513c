"""Weight formats: how the weight of an expert linear is stored, and what it means.

| format | tensors per projection | bits |
|---|---|---|
| none (`Unquantized`) | `weight [E, N, K]`, or `[E, K, N]` where the model stores it transposed | as the model's |
| `Int8WeightOnly` | `qdata int8 [E, N, K]`, `scale [E, N]` | 8 |
"""

from moe_fx.formats.base import Unquantized, WeightFormat, known_formats
from moe_fx.formats.int8 import Int8WeightOnly

__all__ = ["Int8WeightOnly", "Unquantized", "WeightFormat", "known_formats"]
