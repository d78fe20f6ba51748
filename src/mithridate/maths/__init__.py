"""Pure functions of tensors: derivatives, norms, distances, ascents."""
