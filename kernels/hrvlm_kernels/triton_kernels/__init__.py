"""The Triton kernels of the ops, their launchers and tile sizes; all of it needs Triton."""
