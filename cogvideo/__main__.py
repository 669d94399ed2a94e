from cogvideo.stopping import exit_on_signals


def main() -> None:
    """Run the command line. Whoever stops it while it is imported sees no traceback either."""
    exit_on_signals()
    from cogvideo.cli import main as run

    run()


if __name__ == "__main__":
    main()
