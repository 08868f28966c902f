"""Facts about the tensors of a normalised graph: axes, factored, masks, sites."""
