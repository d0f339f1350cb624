"""Many devices: experts on ranks, balance over the global batch, gradients as of one process."""
