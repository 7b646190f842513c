"""int8: symmetric, one scale per output channel; activations as they are, or quantized per row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_fx.formats.per_channel import PerChannel

__all__ = ["Int8Dynamic", "Int8WeightOnly"]


@dataclass(frozen=True)
class Int8WeightOnly(PerChannel):
    """Symmetric int8 weights with one scale per output channel; activations stay in their own dtype.

    ``scale[n] = max_k |w[n, k]| / 127.5`` and ``qdata = round(w / scale)``, ties to even, within [-128, 127]: what
    torchao's ``Int8WeightOnlyConfig()`` does, bit for bit.

    Tensors: ``qdata`` int8 ``[E, N, K]``, ``scale`` float32 ``[E, N]``.
    """

    name = "int8_weight_only"
    dtype = torch.int8


@dataclass(frozen=True)
class Int8Dynamic(PerChannel):
    """int8 weights as :class:`Int8WeightOnly`; each row of activations is quantized likewise when it comes.

    Products are summed without loss in int32 or its equal in floating point. torchao's
    ``Int8DynamicActivationInt8WeightConfig()``.

    Tensors: ``qdata`` int8 ``[E, N, K]``, ``scale`` float32 ``[E, N]``.
    """

    name = "int8_dynamic"
    dtype = torch.int8
    dynamic = True
