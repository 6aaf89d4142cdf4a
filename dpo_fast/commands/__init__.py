"""One module per command, each with `main(argv) -> int`, the exit status."""
