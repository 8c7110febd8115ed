"""``python -m hrvlm``, where the script ``hrvlm`` is not on the path."""

from .cli import app

if __name__ == "__main__":
    app()
