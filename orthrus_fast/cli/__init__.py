"""What the command line does beyond one prompt; ``generate.py`` is the command."""
