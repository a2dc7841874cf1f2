"""The command ``laser``, also as ``python -m laserlm``."""

from __future__ import annotations

from laserlm import interrupt


def main() -> None:
    """Run the command line. Ctrl-C is handled before its modules are imported, which takes a while."""
    interrupt.install()
    try:
        from laserlm.cli import main as run

        run()
    except KeyboardInterrupt:
        interrupt.end()


if __name__ == "__main__":
    main()
