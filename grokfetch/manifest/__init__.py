"""What a checkpoint must be: its manifest, which torrent it is for, which part of it is wanted."""
