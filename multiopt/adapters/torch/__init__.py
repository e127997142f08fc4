"""What multiopt and PyTorch's own optimizers have in common: settings, state, files."""
