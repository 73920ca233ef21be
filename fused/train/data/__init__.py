"""Clips for training: lists of files, reading, augmentation, mixtures."""
