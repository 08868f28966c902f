"""The torch.compile entry point: ``torch.compile(model, backend="flashsvd")``."""

import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from flashsvd_compile.fingerprint import fingerprint
from flashsvd_compile.options import Options
from flashsvd_compile.pipeline import Rewritten, rewrite
from flashsvd_compile.planner.budget import BudgetError
from flashsvd_compile.report import dump, site_reports, site_table, summary, time_of_passes

log = logging.getLogger(__name__)


def flashsvd(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Rewrite low-rank attention and feed-forwards in ``gm``, then compile it.

    ``mode`` and ``options`` are those of ``torch.compile``; see :class:`Options`. If a pass fails,
    the untouched graph is compiled and a warning says what to report.

    Raises OptionsError for an unknown option, value or mode, and BudgetError where no choice of
    lowerings keeps ``memory_budget``.
    """
    parsed = Options.parse(options, mode)
    try:
        rewritten = rewrite(
            gm, example_inputs, parsed,
            compiled=partial(_compile, options=parsed),
            walk_untouched=parsed.debug_dir is not None,
        )  # fmt: skip
    except BudgetError:
        raise
    except Exception:
        log.warning(
            "flashsvd left a graph as it was, because a pass failed. Results are right, but "
            "nothing was fused%s. Please report this:\n%s",
            "" if parsed.memory_budget is None else ", and memory_budget is not kept",
            traceback.format_exc(),
        )
        return _compile(gm, example_inputs, parsed)
    _tell(rewritten, parsed)
    feed = rewritten.feed
    if feed is None:
        return _compile(rewritten.module, example_inputs, parsed)
    given = [*example_inputs, *feed.inputs(example_inputs)]
    return feed.around(_compile(rewritten.module, given, parsed))


def _tell(rewritten: Rewritten, options: Options) -> None:
    sites = site_reports(rewritten)
    log.info("%s; %s", summary(sites), time_of_passes(rewritten.seconds))
    if rewritten.factoring is not None:
        refused = rewritten.factoring.refused is not None
        log.log(logging.WARNING if refused else logging.INFO, rewritten.factoring.summary())
        log.debug("weights\n%s", rewritten.factoring.table())
    if log.isEnabledFor(logging.DEBUG):  # counting FLOPs takes its time
        log.debug("sites\n%s", site_table(sites))
    log.debug("graph before\n%s", rewritten.before)
    log.debug("graph after\n%s", rewritten.after)
    if options.debug_dir is not None:
        dump(options.debug_dir, rewritten)


def _compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options
) -> Callable[..., Any]:
    if options.compiler == "eager":
        return gm.forward
    if options.compiler == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(gm, list(example_inputs))
    patches = dict(options.inductor)
    if options.memory_budget is not None:
        # Else a buffer that is read for the last time may be kept until another of its size is
        # written, layers later: BERT's intermediate then lies in memory beside the next one's.
        patches.setdefault("allow_buffer_reuse", False)
        # Else whether a matmul's operands are padded in copies is decided by a race, of which a
        # walk over the graph knows nothing: GPT-2 of odd ranks then held twice what was planned.
        patches.setdefault("shape_padding", False)
    # The one entry of Inductor's cache key that takes free text.
    marked = dict(patches.get("unsafe_marked_cacheable_functions", {}))
    marked["flashsvd_compile"] = fingerprint(options)
    patches["unsafe_marked_cacheable_functions"] = marked
    # What torch.compile(backend="inductor") builds: it also readies CUPTI for CUDA graphs.
    return torch._TorchCompileInductorWrapper(None, patches, None)(gm, list(example_inputs))
