"""Tokens a second of ways to run a model, in reading a prompt and in writing on from it."""

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from bench.measure import median_ms
from examples.generating import continued

Way = TypeVar("Way", bound=Hashable)


class Rates(NamedTuple):
    """Tokens a second over all rows together."""

    prefill: float
    decode: float


def rates_of(
    ways: Mapping[Way, Callable[..., Any]], config: Any, prompts: Tensor, new: int
) -> dict[Way, Rates]:
    """One new token is the prefill; what ``new`` of them take beyond
    that is decoding."""
    rows, length = prompts.shape
    calls = {
        f"{index} {count}": partial(continued, run, config, prompts, count, room=new)
        for index, run in enumerate(ways.values())
        for count in (1, new)
    }
    device = prompts.device
    ms = median_ms(calls, device, warmup=1, rounds=20 if device.type == "cuda" else 9)
    rates = {}
    for index, way in enumerate(ways):
        first, all_of_them = ms[f"{index} 1"], ms[f"{index} {new}"]
        decode = rows * (new - 1) / (all_of_them - first) * 1e3
        rates[way] = Rates(rows * length / first * 1e3, decode)
    return rates
