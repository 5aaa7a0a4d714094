"""The ``decentra`` command. Imports neither torch nor hivemind until a command needs them; maps every error to its exit code."""

from __future__ import annotations

import gc
import os
import sys

import typer

from decentra.cli import organise, parts, rewind, take_part, watch
from decentra.cli.app import app
from decentra.cli.doctor import doctor_command
from decentra.errors import ConfigError, DecentraError

__all__ = ["app", "main", "organise", "parts", "rewind", "take_part", "watch"]  # imported for the commands they register

app.command("doctor")(doctor_command)


def main() -> None:
    """Entry point: runs the command and turns errors into one clear line and an exit code."""
    from decentra.cli.console import fail

    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # the p2p daemon is started with exec; gRPC would warn about the fork before it
    try:
        app(prog_name="decentra", standalone_mode=False)
    except typer.Exit as leaving:
        sys.exit(leaving.exit_code)
    except (DecentraError, OSError) as error:
        sys.exit(fail(error, as_json="--json" in sys.argv).exit_code)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        usage = ConfigError(f"{error.format_message().rstrip('.')}; see 'decentra --help'")
        sys.exit(fail(usage, as_json="--json" in sys.argv).exit_code)
    finally:
        gc.freeze()  # the collector would walk all of torch and sympy once more at exit, a second of CPU after the last word


if __name__ == "__main__":
    main()
