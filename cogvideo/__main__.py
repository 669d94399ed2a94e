import os
import signal


def main() -> None:
    """Run the command line. Whoever interrupts it while it is imported sees no traceback either."""
    usual = signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from cogvideo.cli import main as run

    signal.signal(signal.SIGINT, usual)
    run()


if __name__ == "__main__":
    main()
