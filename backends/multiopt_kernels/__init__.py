"""Engines for arrays in the memory of the host, for every library that can share it."""
