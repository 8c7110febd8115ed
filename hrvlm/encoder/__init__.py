"""DINOv3 on packed tokens."""
