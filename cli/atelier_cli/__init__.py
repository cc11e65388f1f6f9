"""The `atelier` command: one module per subcommand. Importing this imports neither torch nor the runtime."""
