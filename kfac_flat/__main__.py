"""``python -m kfac_flat``."""

from kfac_flat.command_line import main

if __name__ == "__main__":
    main(prog="python -m kfac_flat")
