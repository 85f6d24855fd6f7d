"""The command line: python -m bnjax --help."""

import importlib.util
import signal
import sys

import jax


def main() -> int:
    """Runs the command of sys.argv, on the CPU alone, and returns the exit status."""
    needed = ("rich", "tyro")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"error: the command line needs {' and '.join(missing)}: run "
            "pip install 'bnjax[cli]'.",
            file=sys.stderr,
        )
        return 1
    from bnjax import _command_line

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up
    jax.config.update("jax_platforms", "cpu")
    return _command_line.main()


if __name__ == "__main__":
    sys.exit(main())
