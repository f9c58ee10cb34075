"""Lists of values on a command line: `10,25,50`, `1:3:0.25`, or both."""

from __future__ import annotations

import math
from decimal import Decimal, InvalidOperation

from matryoshka_diffusion.config import UsageError

MOST = 1000


def parse_numbers(text: str) -> tuple[float, ...]:
    """The numbers of a list, in which `a:b:step` stands for a, a + step, ... up to and with b.

    Computed in decimals, so that 0.1:0.3:0.1 ends at 0.3.

    Raises:
        UsageError: no such list, or more than 1,000 numbers.

    Example:
        >>> parse_numbers("1:2:0.25,5")
        (1.0, 1.25, 1.5, 1.75, 2.0, 5.0)
    """
    numbers = [number for part in text.split(",") for number in _range(part, text)]
    return tuple(dict.fromkeys(float(number) for number in numbers))


def _range(part: str, text: str) -> list[Decimal]:
    ends = [_decimal(end, text) for end in part.split(":")]
    if len(ends) == 1:
        return ends
    if len(ends) != 3:
        raise UsageError(f"{text!r}: a range is FIRST:LAST:STEP, such as 1:3:0.25")
    first, last, step = ends
    if step <= 0 or last < first:
        raise UsageError(f"{text!r}: a range goes up from FIRST to LAST in steps above 0")
    if last - first >= MOST * step:  # before a division, whose result may have too many digits
        raise UsageError(f"{text!r}: this is more than {MOST:,} values")
    count = int((last - first) // step) + 1
    return [first + number * step for number in range(count)]


def _decimal(text: str, whole: str) -> Decimal:
    try:
        number = Decimal(text.strip())
    except InvalidOperation:
        number = Decimal("nan")
    if not (number.is_finite() and math.isfinite(number)):  # as a float, which it becomes
        raise UsageError(f"{whole!r}: {text!r} is no number; give 1,2,5 or FIRST:LAST:STEP")
    return number
