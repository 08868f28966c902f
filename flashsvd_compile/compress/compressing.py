"""`compress_`: replace a model's linear layers by low-rank factors, in place.

Query, key and value projections are factored per head (each head's [D, in] slice on its own), so
that attention can run on the latents; every other linear layer as one matrix. Methods differ in
what an error costs (``fits.py``), and in who gets which rank:

    "svd"       every error the same                 one share for all: r = keep·m·n / (m + n)
    "fwsvd"     by row Fisher information            the same
    "whitened"  by the inputs' second moment         the same
    "planned"   by its effect on the loss            by loss per byte over the whole model

The last fits blocks in the order of the model, each to what the compressed ones before it give it
(``anchored.py``), and narrows heads on both sides at once where nothing stands between
(``joint.py``).
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from flashsvd_compile.compress.arguments import method_of, size_of
from flashsvd_compile.compress.caps import cap_of
from flashsvd_compile.compress.choosing import choose, weight_bytes
from flashsvd_compile.compress.fitting import Fitted, matrix_by_matrix, planned, progress, row_of
from flashsvd_compile.compress.heads import find_projections
from flashsvd_compile.compress.linears import model_bytes, replace_
from flashsvd_compile.compress.methods import METHODS, calibrated
from flashsvd_compile.compress.moments import Loss
from flashsvd_compile.compress.ranks import share_within
from flashsvd_compile.compress.report import CompressReport
from flashsvd_compile.options import parse_bytes


def compress_(
    model: nn.Module,
    keep: float | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    *,
    weight_budget: int | str | None = None,
    method: str | None = None,
    calibration: Iterable[Any] | None = None,
    loss: Loss | None = None,
    sram_budget: int | str | None = None,
    seed: int = 0,
) -> CompressReport:
    """Replace the linear layers of ``model`` in place by low-rank ones; biases are kept.

    Args:
        model: any module that holds ``nn.Linear`` or transformers' ``Conv1D``, with real weights.
        keep: share of the parameters of the matrices to factor that their factors have, in (0, 1];
            0.5 where no ``weight_budget`` is given.
        include: `fnmatch` patterns of module paths (``"encoder.layer.*.output.dense"``); only
            linear layers that match one are factored. None means all.
        exclude: patterns of linear layers to leave dense; wins over ``include``.
        weight_budget: in place of ``keep``, bytes that all parameters of the model may take
            together, a number or ``"200MiB"``.
        method: ``"svd"``, ``"fwsvd"``, ``"whitened"`` or ``"planned"``; by default the last where
            there is calibration, else the first.
        calibration: batches of real inputs: mappings are passed to the model by name, tuples by
            position. Tokens that an ``attention_mask`` leaves out do not count. All are held in
            memory meanwhile.
        loss: of the model's output and the batch: a scalar, or a tensor of results that shall stay
            as they are. By default the output's own ``loss`` where it has one (a batch with
            labels), else the output itself stays.
        sram_budget: bytes of shared memory that a block of the kernels may use, a number or
            ``"48KiB"``: no rank becomes so large that none of their tiles fits into it.
        seed: of the directions along which outputs are differentiated.

    Layers whose factors would not be smaller, that share their weight, that are more than a plain
    linear, or that calibration did not reach stay dense, with the reason in the report. An error
    or an interrupt leaves the model untouched.

    Raises TypeError and ValueError for arguments that are none, ValueError for weights that are not
    finite or on the meta device, and for a budget that the smallest ranks exceed.
    """
    name = method_of(method, calibration, tuple(METHODS), default="planned")
    share, budget = size_of(keep, weight_budget)
    sram = parse_bytes("sram_budget", sram_budget)
    chosen = choose(model, include, exclude)
    matrices = chosen.matrices
    for found in matrices.values():
        found.validate()
    batches = None if calibration is None else list(calibration)
    how, unfit = calibrated(name, model, matrices, progress(batches or (), "calibrate"), loss, seed)
    matrices = {path: one for path, one in matrices.items() if path not in unfit}
    if sram is not None:
        how = replace(how, caps={path: cap_of(one, sram) for path, one in matrices.items()})
    bytes_before = model_bytes(model)
    if budget is not None:
        share = share_within(budget, bytes_before, weight_bytes(matrices), "what stays dense")
    if name == "planned":
        assert batches is not None
        projections = find_projections(model, chosen.out_features)
        fits = planned(model, how, matrices, projections, batches, share)
    else:
        fits = matrix_by_matrix(how, matrices, share)

    rows = []
    for linear in chosen.linears:
        path = linear.path
        fit = fits.get(path) or unfit.get(path) or chosen.reasons[path]
        rows.append(row_of(linear, fit))
    for linear in chosen.linears:
        one = fits.get(linear.path)
        if isinstance(one, Fitted):
            replace_(model, linear.paths, one.module)
    return CompressReport(share, tuple(rows), bytes_before, model_bytes(model), name)
