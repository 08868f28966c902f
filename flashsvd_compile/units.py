"""Numbers as people read them: three digits that count, and the unit."""

_BYTES = ("bytes", "KiB", "MiB", "GiB", "TiB")
_SECONDS = ("µs", "ms", "s")
_FLOPS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP")


def bytes_text(size: float) -> str:
    """``96 bytes``, ``1.5 KiB``, ``393 MiB``."""
    return _scaled(size, 2**10, _BYTES)


def flops_text(count: float) -> str:
    """``96 FLOP``, ``4.83 GFLOP``."""
    return _scaled(count, 10**3, _FLOPS)


def seconds_text(seconds: float) -> str:
    """``3.61 µs``, ``1.2 ms``."""
    return _scaled(seconds * 1e6, 10**3, _SECONDS)


def _scaled(number: float, step: int, units: tuple[str, ...]) -> str:
    power = 0
    while number >= 999.5 and power + 1 < len(units):
        number, power = number / step, power + 1
    decimals = max(0, 3 - len(str(int(number))))
    digits = f"{number:.{decimals}f}"
    return f"{digits.rstrip('0').rstrip('.') if decimals else digits} {units[power]}"
