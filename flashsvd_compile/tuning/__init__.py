"""Times tiles on the device that a graph is compiled for, and keeps what it finds."""
