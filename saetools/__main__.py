"""`python -m saetools` is `saetools`; `torchrun -m saetools harvest ...` runs it in several processes."""

from saetools.cli.entry import main

if __name__ == "__main__":
    main()
