"""`python -m shoal`: the command line, as torchrun starts it."""

from shoal.cli import main

if __name__ == "__main__":
    main()
