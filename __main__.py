"""`python -m looptap`, the same as the `looptap` command."""

from .cli.entry import main

if __name__ == "__main__":
    main()
