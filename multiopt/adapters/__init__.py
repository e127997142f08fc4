"""Hosts that multiopt can serve in place of their own optimizers: one file a host."""
