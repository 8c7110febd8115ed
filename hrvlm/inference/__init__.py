"""What the commands do with a model: features of images, answers about them, a server."""
