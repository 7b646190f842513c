"""torchao's configurations as weight formats. torchao itself is imported only where one is given.

Where a configuration means one of our formats, torchao quantizes and our lowerings compute; any other is a technique
for linears.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_fx.formats.any_linear import AnyLinear, linear_of
from moe_fx.formats.base import Unquantized, WeightFormat
from moe_fx.formats.float8 import Float8Dynamic, Float8WeightOnly
from moe_fx.formats.int4 import Int4WeightOnly, packed
from moe_fx.formats.int8 import Int8Dynamic, Int8WeightOnly

__all__ = ["Torchao", "from_torchao", "is_torchao_config", "stored_form"]


@dataclass(frozen=True)
class Torchao:
    """One of our formats, whose weights are quantized by torchao.

    Attributes:
        form: how the result is stored and computed with. config: torchao's.
    """

    form: WeightFormat
    config: object

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As :meth:`WeightFormat.quantize`."""
        config = self.config
        if isinstance(self.form, Float8Dynamic):
            # The same weights; torchao refuses the dynamic configuration where no GPU is.
            from torchao.quantization import Float8WeightOnlyConfig

            config = Float8WeightOnlyConfig()
        experts = [_stored(self.form, _quantized(config, matrix).weight) for matrix in weight]
        return tuple(torch.stack(same) for same in zip(*experts, strict=True))

    def __hash__(self) -> int:  # torchao's configurations compare and do not hash
        return hash((self.form, type(self.config)))


def stored_form(chosen: WeightFormat | Torchao | None) -> WeightFormat:
    """In what form a weight ends up, whoever quantizes it."""
    if chosen is None:
        return Unquantized()
    return chosen.form if isinstance(chosen, Torchao) else chosen


def is_torchao_config(value: object) -> bool:
    """Whether a value is a torchao configuration (without importing torchao)."""
    bases = type(value).__mro__
    return any(base.__name__ == "AOBaseConfig" and base.__module__.startswith("torchao.") for base in bases)


def from_torchao(config: Any) -> WeightFormat | Torchao:
    """The format that a torchao configuration means."""
    form = _same_meaning(config)
    if form is not None:
        return Torchao(form, config)
    return AnyLinear(_Technique(config), f"torchao.{type(config).__name__}")


@dataclass(frozen=True)
class _Technique:
    config: object

    def __call__(self, linear: nn.Linear) -> None:
        _quantize_(linear, self.config)

    def __hash__(self) -> int:
        return hash(type(self.config))


def _quantized(config: object, matrix: torch.Tensor) -> nn.Linear:
    linear = linear_of(matrix)
    _quantize_(linear, config)
    return linear


def _quantize_(linear: nn.Linear, config: object) -> None:
    from torchao.quantization import quantize_

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's, about its own future
        quantize_(linear, config)


def _same_meaning(config: Any) -> WeightFormat | None:
    """One of our formats with the same tensors and arithmetic, or None."""
    from torchao.quantization import PerGroup, PerRow

    def per_row(value: object) -> bool:
        return all(isinstance(each, PerRow) for each in (value if isinstance(value, list | tuple) else [value]))

    match type(config).__name__:
        case "Int8WeightOnlyConfig" if per_row(config.granularity):
            return Int8WeightOnly()
        case "Int8DynamicActivationInt8WeightConfig" if (
            per_row(config.granularity)
            and config.act_mapping_type.name == "SYMMETRIC"
            and not (config.weight_only_decode or config.reduce_range)
        ):
            return Int8Dynamic()
        case "Float8WeightOnlyConfig" if config.weight_dtype is torch.float8_e4m3fn:
            return Float8WeightOnly()
        case "Float8DynamicActivationFloat8WeightConfig" if (
            per_row(config.granularity)
            and config.weight_dtype is config.activation_dtype is torch.float8_e4m3fn
            and config.activation_value_lb is config.activation_value_ub is None
        ):
            return Float8Dynamic()
        case "IntxWeightOnlyConfig" if (
            str(config.weight_dtype) == "torch.int4"
            and isinstance(config.granularity, PerGroup)
            and config.mapping_type.name in ("SYMMETRIC", "ASYMMETRIC")
            and config.scale_dtype is None
            and config.intx_packing_format.name == "UNPACKED_TO_INT8"
            and config.intx_choose_qparams_algorithm.name == "AFFINE"
        ):
            return Int4WeightOnly(config.granularity.group_size, config.mapping_type.name == "SYMMETRIC")
    return None


def _stored(form: WeightFormat, weight: Any) -> list[torch.Tensor]:
    """torchao's tensors in the layout of our format."""
    if isinstance(form, Int4WeightOnly):
        zeros = [] if form.symmetric else [weight.zero_point]
        return [packed(weight.qdata), weight.scale, *zeros]
    return [weight.qdata, weight.scale.reshape(weight.qdata.shape[0])]
