"""Training data: lists of video files, clips in batches, augmentation, mixup."""
