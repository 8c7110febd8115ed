"""DINOv3 on packed tokens, and the same kernels in models that others made."""
