"""Words on a terminal: `main` and one file per command. Nothing else prints or sets up logs."""
