"""The command `trainer`: words and YAML in, results on stdout, progress and messages on stderr."""
