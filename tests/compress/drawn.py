"""Weights of tiny models, drawn so that they do what trained ones do."""

import torch


def spread(model):
    """Random weights of a size at which attention attends."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.normal_(std=2 * p.shape[1] ** -0.5)
            elif name.endswith("bias"):
                p.normal_(std=0.3)
    return model.eval()
