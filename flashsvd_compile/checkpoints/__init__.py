"""Models in files: other tools' factors read into this package's modules, and our own format.

A checkpoint becomes a model in four steps, none of which holds a dense weight of a factored layer:

    storage     path → tensors by name, mapped into memory; pickles of code are refused
    skeleton    config or base model → modules on the meta device
    layouts     names and shapes → which linear, which factor        (native: the config says it)
    placing     factored modules in the place of linears, then every tensor in its place
"""
