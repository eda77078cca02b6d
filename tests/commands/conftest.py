"""What tests of several commands share."""

import pytest

from grokfetch.fetch.swarm import SwarmSettings, seed


@pytest.fixture(scope="module")
def peer(published):
    """HOST:PORT of a seed of the checkpoint that a module has published."""
    torrent = published.joinpath("tiny.torrent").read_bytes()
    with seed(torrent, published, SwarmSettings.loopback()) as seeder:
        yield f"127.0.0.1:{seeder.port}"
