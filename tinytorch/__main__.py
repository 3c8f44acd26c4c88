"""`python -m tinytorch` is the command `tinytorch`."""

from tinytorch.cli import main

if __name__ == "__main__":
    main()
