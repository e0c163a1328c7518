"""`Precision`: bits of weights and activations, groups and calibration."""

from __future__ import annotations

import dataclasses
import re

from bipolar_jax.format import TERNARY, BipolarFormat, as_format
from bipolar_jax.quantize.calibration import Calibration, check_calibration, default_calibration
from bipolar_jax.quantize.integer_groups import Scales, check_scales, default_scales


def activation_format(a_bits: int | BipolarFormat, span: float = 1.0, symmetric: bool = False) -> BipolarFormat:
    """The n-bit format of activations; a format is returned as it is.

    Raises:
      ValueError: bits outside 1 to 8, the ternary format, a span that is not in (0, 1], or symmetric at 1 bit.
    """
    try:
        if not isinstance(a_bits, BipolarFormat):
            return BipolarFormat(a_bits, span=span, symmetric=symmetric)
        if a_bits.ternary:
            raise ValueError("numbers have 1 to 8 bits, got the ternary format")
        return a_bits
    except ValueError as error:
        raise ValueError(f"activation {error}; a_bits=None leaves activations float") from error


_PATTERN = re.compile(r"W(?P<w>1\.58|\d+)A(?P<a>\d+)(?P<symmetric>s)?(?:g(?P<group>\d+)(?P<scales>[fi])?)?")
_SCALES: dict[str, Scales] = {"f": "float", "i": "integer"}


@dataclasses.dataclass(frozen=True)
class Precision:
    """Bits of weights and activations, and how the scales of weights are chosen.

    Attributes:
      w_bits: weight bits 1..8, or `TERNARY`.
      a_bits: activation bits 1..8; activations are quantized per token at run time. None
        leaves them float.
      group_size: weights along the contracted axis that share a scale; None is one scale per
        output channel.
      calibration: how the scales of weights are chosen, see `quantize`; None becomes the default for the weight bits,
        see `default_calibration`.
      scales: of the groups, "float" or "integer", see `quantize`; None becomes "integer" for groups of 1 to 6 bits,
        else "float".
      a_span: the part of a token's range that the grid of its activations spans, see `BipolarFormat.span`;
        `compress.calibrate` can find it.
      a_symmetric: whether the grid of a token is symmetric about 0, as files of other libraries may state, see
        `BipolarFormat.symmetric`. Otherwise it spans from the token's smallest to its largest number, which is at least
        as fine.

    `print` shows the text that `parse` reads, such as "W4A8g64", or "W4A8sg64" of symmetric tokens. It covers every
    field but the calibration and the span, so files store the fields.

    Raises:
      ValueError: a value outside the above.
    """

    w_bits: int | BipolarFormat
    a_bits: int | None = None
    group_size: int | None = None
    calibration: Calibration | None = None
    scales: Scales | None = None
    a_span: float = 1.0
    a_symmetric: bool = False

    def __post_init__(self):
        if isinstance(self.w_bits, str):
            raise ValueError(f"w_bits is the string {self.w_bits!r}: use Precision.parse, or give a number of bits")
        number_format = as_format(self.w_bits)
        object.__setattr__(self, "w_bits", number_format if number_format.ternary else number_format.bits)
        if self.a_bits is not None:
            object.__setattr__(self, "a_span", self.a_format.span)
        elif self.a_span != 1:
            raise ValueError(f"a_span is {self.a_span!r}, but float activations have no grid: leave it at 1")
        elif self.a_symmetric:
            raise ValueError("a_symmetric is set, but float activations have no grid: leave it False")
        if self.group_size is not None and (type(self.group_size) is not int or self.group_size < 1):
            raise ValueError(f"group_size must be an integer of at least 1, or None, got {self.group_size!r}")
        if self.calibration is None:
            object.__setattr__(self, "calibration", default_calibration(number_format))
        check_calibration(self.calibration, number_format)
        if self.scales is None:
            object.__setattr__(self, "scales", self._default_scales())
        check_scales(self.scales, number_format, self.group_size)

    @property
    def a_format(self) -> BipolarFormat | None:
        """The grid of activations; None if they stay float."""
        return None if self.a_bits is None else activation_format(self.a_bits, self.a_span, self.a_symmetric)

    @classmethod
    def of(cls, precision: Precision | str) -> Precision:
        """A precision, or the text of one with the default calibration.

        Raises:
          ValueError: neither of them, or as `parse`.
        """
        if isinstance(precision, str):
            return cls.parse(precision)
        if not isinstance(precision, cls):
            raise ValueError(f'a precision must be a Precision or its text, such as "W4A8g64", got {precision!r}')
        return precision

    @classmethod
    def parse(cls, text: str, calibration: Calibration | None = None) -> Precision:
        """Reads the notation "W4A8", "W4A8g64" (groups of 64), "W4A16" (float activations), "W1.58A8" (ternary),
        "W4A8s" (tokens on symmetric grids).

        The scales of groups are of the default kind: integer in "W4A8g64" and "W4A16g64", float in "W8A8g64". An f or i
        after the group size names the kind, as in "W4A8g64f". The text does not name the calibration; None is the
        default for the weight bits.

        Raises:
          ValueError: text of another form, or bits outside 1..8.
        """
        if not isinstance(text, str):
            raise ValueError(f'a precision is parsed of its text, such as "W4A8g64", got {text!r:.60}')
        match = _PATTERN.fullmatch(text.strip())
        if not match:
            raise ValueError(
                f"precision {text!r} is not of the form W4A8 or W4A8g64: weight bits 1..8 or 1.58, "
                "activation bits 1..8 or 16 for float, with s after them for symmetric grids, and optionally a group "
                "size, with f or i after it for float or integer scales"
            )
        return cls(
            w_bits=TERNARY if match["w"] == "1.58" else int(match["w"]),
            a_bits=None if match["a"] == "16" else int(match["a"]),
            group_size=int(match["group"]) if match["group"] else None,
            calibration=calibration,
            scales=_SCALES.get(match["scales"]),
            a_symmetric=match["symmetric"] is not None,
        )

    def __str__(self) -> str:
        activations = "16" if self.a_bits is None else f"{self.a_bits}{'s' if self.a_symmetric else ''}"
        number_format = as_format(self.w_bits)
        group = "" if self.group_size is None else f"g{self.group_size}"
        if self.scales != self._default_scales():
            group += self.scales[0]
        return f"W{number_format.name}A{activations}{group}"

    def _default_scales(self) -> Scales:
        return default_scales(as_format(self.w_bits), self.group_size)
