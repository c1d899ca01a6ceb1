"""`lit-rl`: LightningCLI's fit, validate, test and predict, and a few commands of our own that need no torch."""

from __future__ import annotations

import os
import sys


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    from lit_rl import commands

    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # classes of your own, as with `python -m`
    if not argv or argv[0] in ("-h", "--help"):
        print(commands.HELP, end="")
        return
    try:
        if argv and argv[0] in commands.COMMANDS:
            commands.COMMANDS[argv[0]](argv[1:])
            return
        from lit_rl.cli import resolve, run_cli

        argv = resolve(argv)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        sys.exit(f"lit-rl: {error}")
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from lit_rl.checks import ConfigurationError

    try:
        run_cli(argv)
    except (FileExistsError, PermissionError, MisconfigurationException, ConfigurationError) as error:
        # The run's folder, the Trainer's flags, what does not go together.
        sys.exit(f"lit-rl: {error}")


if __name__ == "__main__":
    main()
