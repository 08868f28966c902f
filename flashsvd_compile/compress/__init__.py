"""Dense weights to low-rank factors, and the modules that hold them."""
