"""The engine without a compiler: a trace as NumPy operations, in blocks of cache size."""
