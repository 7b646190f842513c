"""Weight formats: how the weight of an expert linear is stored, and what it means.

| format | tensors per projection | bits per weight |
|---|---|---|
| none (`Unquantized`) | `weight [E, N, K]`, or `[E, K, N]` where the model stores it transposed | as the model's |
| `Int8WeightOnly`, `Int8Dynamic` | `qdata` int8 `[E, N, K]`, `scale` float32 `[E, N]` | 8 |
| `Float8WeightOnly`, `Float8Dynamic` | `qdata` float8_e4m3fn `[E, N, K]`, `scale` float32 `[E, N]` | 8 |
| `Int4WeightOnly(group_size)` | `qdata` uint8 `[E, N, K/2]`, `scale` (and `zero`) `[E, N, K/group_size]` | over 4 |
| any technique for `nn.Linear` (`AnyLinear`) | those of the module, stacked `[E, ...]` | |

Dynamic formats quantize activations too, row by row, when they come.
"""

from moe_fx.formats.any_linear import AnyLinear
from moe_fx.formats.base import Unquantized, WeightFormat, format_from_record, format_record, known_formats
from moe_fx.formats.float8 import Float8Dynamic, Float8WeightOnly
from moe_fx.formats.int4 import Int4WeightOnly
from moe_fx.formats.int8 import Int8Dynamic, Int8WeightOnly
from moe_fx.formats.per_channel import PerChannel
from moe_fx.formats.torchao import Torchao, from_torchao, is_torchao_config, stored_form

__all__ = [
    "AnyLinear", "Float8Dynamic", "Float8WeightOnly", "Int4WeightOnly", "Int8Dynamic", "Int8WeightOnly", "PerChannel",
    "Torchao", "Unquantized", "WeightFormat", "format_from_record", "format_record", "from_torchao",
    "is_torchao_config", "known_formats", "stored_form",
]  # fmt: skip
