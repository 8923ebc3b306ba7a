"""The command `lit-fast`. Each subcommand is a file with `main(argv) -> int`."""
