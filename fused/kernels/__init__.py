"""GPU source and its launch, nothing else: no modules, no autograd."""
