"""`python -m opensan`: the `opensan` command, for torchrun and for where it is not on the path."""

from opensan.cli import main

if __name__ == "__main__":
    main()
