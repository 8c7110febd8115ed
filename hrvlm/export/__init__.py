"""The encoder as a file for other runtimes, one for any size."""
