"""One file per family of commands: thin, with heavy imports inside functions."""
