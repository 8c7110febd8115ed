"""From rows to batches, and the trainer."""
