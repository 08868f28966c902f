"""Turns each site into a plan: the cheapest legal lowering."""
