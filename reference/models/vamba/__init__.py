"""Vamba (arXiv 2503.11579): read config, rotary, attention, masks, cache, layer, model, loss in this order."""
