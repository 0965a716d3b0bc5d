"""Run the command line: `python -m consilience.cli`."""

from consilience.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
