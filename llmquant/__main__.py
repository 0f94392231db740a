"""``python -m llmquant``: the command line, for launchers such as torchrun that start modules."""

from llmquant.cli import main

if __name__ == "__main__":
    main()
