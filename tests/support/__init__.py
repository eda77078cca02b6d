"""What several test modules share: torrents, swarms, servers, checkpoints and the program."""
