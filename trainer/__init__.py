"""trainer: sharded training of weather models on datasets that shardio reads."""
