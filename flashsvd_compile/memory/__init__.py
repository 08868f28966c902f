"""What a graph will hold in memory while it runs: who owns bytes, for how long, and at most."""
