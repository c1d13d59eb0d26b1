"""`python -m tunefork`: the command line, where its script is not on the path."""

from tunefork.cli.main import main

if __name__ == "__main__":
    main()
