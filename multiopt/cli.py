"""The command line: ``multiopt demo``."""
