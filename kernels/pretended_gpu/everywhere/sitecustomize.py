"""With this folder on PYTHONPATH every process of Python has a pretended GPU, whoever starts it."""

import pretended_gpu

pretended_gpu.install()
