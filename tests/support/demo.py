"""The demo's checkpoint as a folder that was fetched."""

import shutil

from grokfetch.manifest.shipped import demo_folder
from support.program import grokfetch

LOOPBACK = ("--no-discovery", "--listen", "127.0.0.1:0", "--no-mirrors")


def fetch_demo(root):
    """Copy the demo into a folder and prove it; returns the folder."""
    published = demo_folder()
    shutil.copytree(published / "grok-demo", root / "grok-demo")
    torrent, manifest = published / "grok-demo.torrent", published / "grok-demo.json"
    grokfetch("fetch", torrent, "--manifest", manifest, "--to", root, *LOOPBACK)
    return root
