"""float8 e4m3: one scale per output channel; activations as they are, or quantized per row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_fx.formats.per_channel import PerChannel

__all__ = ["Float8Dynamic", "Float8WeightOnly"]


@dataclass(frozen=True)
class Float8WeightOnly(PerChannel):
    """float8 e4m3 weights with one scale per output channel; activations stay in their own dtype.

    ``scale[n] = max_k |w[n, k]| / 448`` and ``qdata = w / scale``, rounded to e4m3 (Micikevicius et al. 2022, "FP8
    Formats for Deep Learning"): what torchao's ``Float8WeightOnlyConfig()`` does, bit for bit, but for channels of
    zeros, which stay zero here.

    Tensors: ``qdata`` float8_e4m3fn ``[E, N, K]``, ``scale`` float32 ``[E, N]``.
    """

    name = "float8_weight_only"
    dtype = torch.float8_e4m3fn


@dataclass(frozen=True)
class Float8Dynamic(PerChannel):
    """float8 e4m3 weights as :class:`Float8WeightOnly`; each row of activations is quantized likewise when it comes.

    torchao's ``Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())``.

    Tensors: ``qdata`` float8_e4m3fn ``[E, N, K]``, ``scale`` float32 ``[E, N]``.
    """

    name = "float8_dynamic"
    dtype = torch.float8_e4m3fn
    dynamic = True
