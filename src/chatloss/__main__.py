"""``python -m chatloss``."""

from chatloss.cli import main

if __name__ == "__main__":
    main()
