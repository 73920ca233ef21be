"""VideoMamba (arXiv 2403.06977): read config, embedding, scan_order, block, backbone, model, chunked in this order."""
