"""Why a site was not taken, or not lowered: a code that never changes, and what was seen."""

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import fx


class Code(str, Enum):
    """What stood in the way. The value is what reports and JSON show."""

    ACTIVATION_UNKNOWN = "activation_unknown"
    ALREADY_LOW_RANK = "already_low_rank"
    BAD_LAYOUT = "bad_layout"
    DATA_DEPENDENT_SCALE = "data_dependent_scale"
    DROPOUT_ACTIVE = "dropout_active"
    DTYPE = "dtype"
    EMBEDDING_TABLE = "embedding_table"
    FORCED = "forced"
    GRADIENTS = "gradients"
    LATENT_HAS_OTHER_USER = "latent_has_other_user"
    MEMORY_BUDGET = "memory_budget"
    MUTATED = "mutated"
    NESTED = "nested"
    NO_FUSED_LOWERING = "no_fused_lowering"
    NO_LOW_RANK_OPERAND = "no_low_rank_operand"
    NO_VALUES = "no_values"
    NOT_PROFITABLE = "not_profitable"
    NOT_YET_COMPUTED = "not_yet_computed"
    OP_NOT_CARRIED = "op_not_carried"
    PLANNED = "planned"
    RANK_TOO_LARGE = "rank_too_large"
    REGION_CROSSED = "region_crossed"
    SOFTMAX_AXIS = "softmax_axis"
    SRAM = "sram"
    UNSUPPORTED_DEVICE = "unsupported_device"
    WEIGHT_BUDGET = "weight_budget"
    WIDE_HAS_OTHER_USER = "wide_has_other_user"


@dataclass(frozen=True)
class Reason:
    """``code`` plus what was observed and what would have been required.

    ``node`` is the name of the graph node where it was seen and ``source`` its line in the
    user's code, where torch kept it.
    """

    code: Code
    observed: str
    required: str = ""
    node: str = ""
    source: str = field(default="", repr=False)

    def __str__(self) -> str:
        text = f"{self.code.value}: {self.observed}"
        if self.required:
            text += f"; required: {self.required}"
        if self.node:
            text += f" (at {self.node}{', ' + self.source if self.source else ''})"
        return text

    def to_dict(self) -> dict[str, Any]:
        return {
            "code": self.code.value,
            "observed": self.observed,
            "required": self.required,
            "node": self.node,
            "source": self.source,
        }


def reason_at(node: fx.Node, code: Code, observed: str, required: str = "") -> Reason:
    """A reason seen at ``node``, with the user's source line if the trace kept it."""
    return Reason(code, observed, required, node.name, source_line(node))


def source_line(node: fx.Node) -> str:
    """``file.py:line`` of the user's code that made ``node``, or an empty string."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    for line in reversed(lines):
        if line.startswith('File "'):
            name, rest = line[len('File "') :].split('"', 1)
            return f"{name.rsplit('/', 1)[-1]}:{rest.split('line ', 1)[-1].split(',', 1)[0]}"
    return ""


def module_path(node: fx.Node) -> str:
    """The dotted path of the module that made ``node``, or an empty string outside modules."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return _readable(path)


def _readable(path: str) -> str:
    """``L['self'].layers.0`` → ``layers.0``; a model by another name keeps it: ``model.layers``."""
    root = re.match(r"[LG]\['(\w+)'\]\.?", path)
    if root is not None:
        name = "" if root[1] in ("self", "fn") else f"{root[1]}."
        path = name + path[root.end() :]
    return path.replace("._modules['", ".").replace("['", ".").replace("']", "").strip(".")
