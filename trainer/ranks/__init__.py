"""Start, watch and end the processes of a command, and tell of a failure once."""
