"""``python -m genfuse`` is the ``genfuse`` command; torchrun starts it this way."""

from genfuse.train.cli import main

if __name__ == "__main__":
    main()
