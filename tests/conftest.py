"""Without a GPU the Triton kernels run under Triton's interpreter, chosen before Triton loads."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
