"""A cache of decoders that keeps keys and values in rank space."""
