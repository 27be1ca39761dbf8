"""The commands: argv → config → one call. Each file is one command."""
