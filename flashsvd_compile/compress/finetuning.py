"""`finetune`: a compressed model trained for a while to do as its dense teacher does.

A recipe on transformers' ``Trainer``, short enough to be read and changed: its loss compares the
model with the frozen teacher (``distilling.py``), and ranks may be cut on the way
(``retruncating.py``).
"""

from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from flashsvd_compile.compress.distilling import distillation
from flashsvd_compile.compress.moments import called, in_evaluation
from flashsvd_compile.compress.retruncating import retruncate_

# Of the output of the model, that of the teacher, and the batch.
Distillation = Callable[[Any, Any, Any], Tensor]

DEFAULTS = {
    "learning_rate": 1e-4,  # five times that tears factors apart whose product was a good start
    "adam_beta2": 0.99,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.06,  # of all
    "num_train_epochs": 3,
    "per_device_train_batch_size": 32,
    "train_sampling_strategy": "group_by_length",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": None,
}


def finetune(
    model: nn.Module,
    teacher: nn.Module,
    data: Iterable[Mapping[str, Any]],
    *,
    args: Any = None,
    loss: Distillation | None = None,
    retruncate: Mapping[int, Mapping[str, Any]] | None = None,
) -> Any:
    """Train all parameters of ``model`` that require gradients, in place; AdamW, without dropout.

    Args:
        model: what `compress_` made of ``teacher``, or any other that returns the like.
        teacher: the dense model; it is neither trained nor changed, but for its device.
        data: tokenized examples (``{"input_ids": [..], "attention_mask": [..]}``, lists of
            numbers), which are put together by length and padded; or whole batches, tensors.
        args: transformers' ``TrainingArguments``, or a mapping of what shall differ from
            `DEFAULTS`, under which no checkpoint is written.
        loss: of the model's output, the teacher's and the batch; by default `distillation`.
        retruncate: by a step after which ranks are cut, the arguments of `retruncate_`.

    Returns what ``Trainer.train`` does. Both models are moved to the device of ``args``.

    Raises ImportError without transformers or accelerate, ValueError for data without an example.
    """
    if find_spec("transformers") is None or find_spec("accelerate") is None:
        raise ImportError('finetune needs pip install "flashsvd_compile[train]"')
    from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

    rows: Any = data if hasattr(data, "__getitem__") else list(data)
    if not len(rows):
        raise ValueError("data holds no example")
    has_batches = any(isinstance(x, Tensor) and x.dim() > 1 for x in rows[0].values())
    padding = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
    compare = loss or distillation
    both_are_transformers = all(isinstance(x, PreTrainedModel) for x in (model, teacher))
    asked = {"output_hidden_states": True} if both_are_transformers and loss is None else {}

    class Distilling(Trainer):
        def compute_loss(  # type: ignore[override]
            self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any
        ) -> Any:
            model.eval()  # dropout would be noise that the teacher has not
            given = {**inputs, **asked}
            output = called(model, given)
            with torch.no_grad():
                wanted = called(teacher, given)
            found = compare(output, wanted, inputs)
            return (found, output) if return_outputs else found

    class Cutting(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **now: Any) -> None:
            if wanted := (retruncate or {}).get(state.global_step):
                retruncate_(now["model"], optimizer=now["optimizer"], **wanted)

    modes = [(module, module.training) for module in model.modules()]
    with TemporaryDirectory() as unused, in_evaluation(teacher):
        if args is None or isinstance(args, Mapping):
            given = DEFAULTS | ({"per_device_train_batch_size": 1} if has_batches else {})
            given |= {"train_sampling_strategy": "random"} if has_batches else {}
            args = TrainingArguments(**{"output_dir": unused, **given, **(args or {})})
        args.remove_unused_columns = False
        trainer = Distilling(
            model, args, train_dataset=rows, callbacks=[Cutting()],
            data_collator=_only if has_batches else lambda found: padded(found, padding),
        )  # fmt: skip
        trainer.model_accepts_loss_kwargs = False  # ours is a mean, not a sum over labels
        teacher.to(args.device)
        try:
            return trainer.train()
        finally:
            for module, training in modes:
                module.training = training


def padded(examples: list[Mapping[str, Any]], padding: int = 0) -> dict[str, Tensor]:
    """Rows of numbers as tensors [rows, longest], and a mask where they had none."""
    fill = {"input_ids": padding, "labels": -100}
    rows = [{"attention_mask": [1] * len(x["input_ids"]), **x} for x in examples]
    return {
        name: nn.utils.rnn.pad_sequence(
            [torch.as_tensor(row[name]) for row in rows], True, fill.get(name, 0)
        )
        for name in rows[0]
    }


def _only(batches: list[Any]) -> Any:
    (batch,) = batches
    return dict(batch)
