"""A page to look through the features of images: one file, no network, in any browser."""
