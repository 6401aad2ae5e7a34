"""``python -m segmentation ...`` is the same program as ``lightning ...``."""

from .cli import main

if __name__ == "__main__":
    main()
