"""BitTorrent's formats and the arithmetic of pieces: read, made, and read back from the disk."""
