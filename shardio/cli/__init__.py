"""The command `shardio`: words in, results on stdout, progress and messages on stderr."""
