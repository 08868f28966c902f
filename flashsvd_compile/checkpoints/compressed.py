"""`compress_checkpoint`: a dense checkpoint → low-rank factors, file to file."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from flashsvd_compile.checkpoints import native
from flashsvd_compile.checkpoints.errors import CheckpointError
from flashsvd_compile.checkpoints.load import mapped_model
from flashsvd_compile.checkpoints.save import saving
from flashsvd_compile.checkpoints.shards import Shards
from flashsvd_compile.checkpoints.storage import read_checkpoint
from flashsvd_compile.compress.arguments import method_of, size_of
from flashsvd_compile.compress.caps import cap_of
from flashsvd_compile.compress.choosing import choose, weight_bytes
from flashsvd_compile.compress.fitting import Fitted, progress, row_of
from flashsvd_compile.compress.linears import model_bytes, replace_
from flashsvd_compile.compress.ranks import share_within
from flashsvd_compile.compress.report import CompressReport
from flashsvd_compile.compress.streaming import STREAMED, streamed
from flashsvd_compile.options import parse_bytes


def compress_checkpoint(
    source: str | Path,
    target: str | Path,
    keep: float | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    *,
    weight_budget: int | str | None = None,
    method: str | None = None,
    calibration: Iterable[Any] | None = None,
    sram_budget: int | str | None = None,
    base: Any = None,
    max_shard_size: int | str = "5GB",
) -> CompressReport:
    """Factor the linear layers of a checkpoint that need not fit into memory, file to file.

    Weights are read where they lie in the files, layer by layer; a layer's factors are written
    once a shard is full. With calibration the model runs block by block: what is held is the
    moments of one block, one hidden state a batch, and the activations of one batch in one block.
    Each batch goes through the whole model once before, so that few large ones are faster. What
    comes out is what `compress_` and `save_pretrained` make of the model, method for method.

    Args:
        source: a dense checkpoint of a model of transformers: a directory, or a file beside its
            config.json. ``.safetensors``, sharded or not, or ``.bin`` with nothing but tensors.
        target: the directory to write, as `save_pretrained` does; `from_pretrained` loads it.
        keep, include, exclude, weight_budget, sram_budget: as in `compress_`.
        method: ``"svd"``, or ``"whitened"``, the default where there is calibration. The others
            differentiate the whole model, which has to be in memory: load it and use `compress_`.
        calibration: batches of real inputs, as in `compress_`.
        base: what the model is, as in `load_checkpoint`, where config.json does not say it.
        max_shard_size: bytes of one written file at most, or a string as ``"5GB"``; as much of the
            factors is held in memory.

    An error or an interrupt leaves ``target`` as it was.

    Raises as `compress_`, `load_checkpoint` and `save_pretrained` do, and ValueError where there is
    calibration and the model's blocks are not called one after another.
    """
    name = method_of(method, calibration, STREAMED, default="whitened")
    share, budget = size_of(keep, weight_budget)
    sram = parse_bytes("sram_budget", sram_budget)
    batches = list(calibration or ())
    if calibration is not None and not batches:
        raise ValueError("calibration holds no batch")
    checkpoint = read_checkpoint(source)
    if native.is_native(checkpoint.config):
        raise CheckpointError(f"{source} is low-rank already; load it, and pass it to retruncate_")
    model = mapped_model(checkpoint, base)
    chosen = choose(model, include, exclude)
    matrices = chosen.matrices
    caps = {} if sram is None else {path: cap_of(one, sram) for path, one in matrices.items()}
    bytes_before = model_bytes(model)
    if budget is not None:
        share = share_within(budget, bytes_before, weight_bytes(matrices), "what stays dense")
    linears = {linear.path: linear for linear in chosen.linears}
    rows = {path: row_of(linears[path], why) for path, why in chosen.reasons.items() if why}
    with saving(model, target, max_shard_size) as shards:
        fits = streamed(model, name, matrices, share, batches, caps)
        for path, fit in progress(fits, "compress", len(matrices)):
            rows[path] = row_of(linears[path], fit)
            if isinstance(fit, Fitted):
                _write_factors(shards, path, fit.module)
                replace_(model, linears[path].paths, fit.module)
    in_order = tuple(rows[linear.path] for linear in chosen.linears)
    return CompressReport(share, in_order, bytes_before, model_bytes(model), name)


def _write_factors(shards: Shards, path: str, module: nn.Module) -> None:
    """Into a file, and out of memory."""
    for name in ("u", "v"):
        factor = module.get_parameter(name).detach()
        shards.add(f"{path}.{name}", factor)
        setattr(module, name, nn.Parameter(factor.to("meta"), requires_grad=False))
