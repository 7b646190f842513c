"""What the user asks for: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from moe_fx.errors import ConfigError
from moe_fx.formats import AnyLinear, Torchao, WeightFormat, from_torchao, is_torchao_config, known_formats

__all__ = ["Config", "FormatRules"]

EXPERTS = ("auto", "grouped_mm", "linear", "gather", "fused")
STORAGE = ("auto", "stacked", "per_expert")


class _NamedFields(type):
    """Makes an unknown keyword an error that lists the valid ones, instead of Python's bare TypeError."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        valid = [f.name for f in fields(cls)]
        for name in kwargs:
            if name not in valid:
                choices = ", ".join(valid)
                raise ConfigError(f"{cls.__name__} has no option {name!r}; the options are {choices}")
        return super().__call__(*args, **kwargs)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ConfigError(f"Config.{name}={value!r} is not one of {listed}")


def _check_format(name: str, value: object) -> None:
    if value is None or isinstance(value, WeightFormat) or is_torchao_config(value):
        return
    if callable(value) and not isinstance(value, type):
        return
    hint = " (did you mean to call it?)" if isinstance(value, type) and issubclass(value, WeightFormat) else ""
    listed = ", ".join(f"moe_fx.{f.__name__}()" for f in known_formats())
    raise ConfigError(
        f"{name}={value!r} is not a weight format{hint}; the formats are None, {listed}, "
        "a torchao configuration, or a function that quantizes an nn.Linear"
    )


def _check_formats(name: str, value: object) -> None:
    if not isinstance(value, Mapping):
        _check_format(name, value)
        return
    for pattern, each in value.items():
        if not isinstance(pattern, str):
            raise ConfigError(f"{name} has the key {pattern!r}, which is not a name pattern")
        _check_format(f"{name}[{pattern!r}]", each)


@dataclass(frozen=True)
class Config(metaclass=_NamedFields):
    """How MoE layers are rewritten.

    Attributes:
        experts: the lowering. ``"grouped_mm"`` sorts token rows by expert and multiplies group by group;
            ``"linear"`` applies every expert as plain linears; ``"gather"`` reads only the chosen experts'
            weights, row by row; ``"fused"`` is this library's Triton kernels (compute capability 9.0;
            elsewhere ``"grouped_mm"`` is written, and the report says so); ``"auto"`` chooses per layer, and the
            report says why.
        quantize: the weight format of the experts: ``None`` leaves weights as they are, a format such as
            ``moe_fx.Int8WeightOnly()`` takes all experts, and a dict maps name patterns (shell style: ``*``,
            ``?``, ``[...]``) to a format or ``None``. A pattern is compared with the full name of each expert
            parameter and of its layer; the most specific one wins (most characters that are not
            wildcards), among equals the later. A pattern that matches nothing is an error. In place of a
            format, a torchao configuration, or any function that quantizes an ``nn.Linear`` in place.
        linears: the format of the program's other linears (attention, shared experts, ...): ``None`` leaves them, a
            format takes all but routers and output heads, and a dict works as that of ``quantize``. A router (what
            only decides on ids and routing weights) and a head (whose result is an output) are taken only where
            a pattern names them: its last part has no wildcard, as in ``"*.gate"`` or ``"lm_head.weight"``.
        storage: ``"stacked"`` keeps one ``[E, ...]`` tensor per projection, ``"per_expert"`` one tensor per
            expert (lowering ``"linear"`` only), ``"auto"`` what the lowering reads best.
        validate: run the numeric check of every raised layer (original against replacement, on random
            inputs in float64); a layer that fails it is left as it was.
        require: ``None`` accepts any number of layers; an int is the least number that must be rewritten;
            ``"all"`` means that at least one layer is found and none is nearly missed.
        consume: empty the input's tensors (those of the model it was exported from, too) as soon as their quantized
            forms exist, so that memory never holds a weight twice; the input cannot be run again. The one exception
            to the rule that a transform leaves its input alone. Not for the backend.

    Raises:
        ConfigError: an unknown option or value, with the valid ones listed.
    """

    experts: str = "auto"
    quantize: Any = None
    linears: Any = None
    storage: str = "auto"
    validate: bool = True
    require: int | str | None = None
    consume: bool = False

    def __post_init__(self) -> None:
        _check_choice("experts", self.experts, EXPERTS)
        _check_choice("storage", self.storage, STORAGE)
        for name in ("validate", "consume"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"Config.{name}={getattr(self, name)!r} is not True or False")
        self._check_require()
        _check_formats("Config.quantize", self.quantize)
        _check_formats("Config.linears", self.linears)
        if self.storage == "per_expert" and self.experts not in ("auto", "linear"):
            raise ConfigError(
                f"Config.storage='per_expert' needs experts='linear' (or 'auto'), not {self.experts!r}: "
                "the other lowerings read one stacked tensor"
            )

    def _check_require(self) -> None:
        wanted = self.require
        if wanted is None or wanted == "all":
            return
        if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 0:
            raise ConfigError(f"Config.require={wanted!r} is not None, 'all' or a number of layers")

    @property
    def quantizes(self) -> bool:
        """Whether any weight may change its format."""
        wanted = (self.quantize, self.linears)
        return any(
            value is not None for each in wanted for value in (each.values() if isinstance(each, Mapping) else [each])
        )


def _as_format(value: Any) -> WeightFormat | Torchao | None:
    if value is None or isinstance(value, WeightFormat):
        return value
    if is_torchao_config(value):
        return from_torchao(value)
    return AnyLinear(value, getattr(value, "__name__", type(value).__name__))


class FormatRules:
    """``Config.quantize`` or ``Config.linears`` as a question: which format does this parameter get?

    Remembers which patterns matched something, so that those that never did can be refused.
    """

    def __init__(self, config: Config, option: str = "quantize") -> None:
        wanted = getattr(config, option)
        named = wanted if isinstance(wanted, Mapping) else {"*": wanted}
        self._option = option
        self._rules = {pattern: _as_format(value) for pattern, value in named.items()}
        self._named = isinstance(wanted, Mapping)
        self._used: set[str] = set()

    def format_of(self, param_fqn: str, module_fqn: str, only_named: bool = False) -> WeightFormat | Torchao | None:
        """The format of the most specific matching pattern; ``None`` where none matches.

        With ``only_named``, patterns whose last part has a wildcard do not match.
        """
        best: WeightFormat | Torchao | None = None
        best_score = -1
        for pattern, value in self._rules.items():
            if only_named and set("*?[]") & set(pattern.removesuffix(".weight").rpartition(".")[2]):
                continue
            names = (param_fqn, module_fqn)
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                self._used.add(pattern)
                score = sum(char not in "*?[]" for char in pattern)
                if score >= best_score:
                    best, best_score = value, score
        return best

    def check_all_used(self, kind: str, fqns: list[str]) -> None:
        """Raise ConfigError if a pattern the user named matched no parameter and no module."""
        unused = [pattern for pattern in self._rules if pattern not in self._used]
        if not self._named or not unused:
            return
        listed = ", ".join(fqns[:8]) + (", ..." if len(fqns) > 8 else "")
        raise ConfigError(
            f"Config.{self._option} pattern {unused[0]!r} matches no {kind}; "
            f"the parameters found are: {listed or 'none'}"
        )
