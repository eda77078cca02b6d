"""The checkpoint directory: its state files, what is proven in it, and what is found wrong.

    DIR/                     the payload as the torrent lays it down, top folder kept, but for files
                             that lay there in another layout and were adopted
    DIR/.../NAME.part        a file that is not asked for, with the bytes that share a piece with
                             one that is; it gets its name when it is asked for. A NAME that is too
                             long for the ending is truncated (`names.with_ending`).
                             Without a torrent: a file that is not whole yet
    DIR/.grokfetch/          our state (elsewhere with `state`); deleting it costs time, never data
        lock                 locked (flock) exclusively while payload or record are written, shared
                             by readers that ask; holds the owner's {"pid", "host"} as JSON. The
                             kernel drops the lock of a dead owner, so that it never blocks
        manifest.json        the manifest in force (`manifest.SCHEMA`), its paths those of the
                             torrent
        selection.json       what is asked for, where that is not everything (`selection.SCHEMA`)
        places.json          where files lie, if not where the torrent puts them (`places.SCHEMA`)
        metadata.torrent     a torrent file: the info dictionary as the swarm gave it, and its v2
                             piece layers. The format is BitTorrent's own
        record.json          schema (`record.SCHEMA`), sha256 of the rest, info hash, bit field of
                             the proven pieces in hexadecimal (piece 0 is the highest bit), and for
                             each file: size, mtime_ns, sha256 or null, "writing" or ""
        progress.json        how the fetches have gone, and who has sent how much
                             (`history.SCHEMA`), for `status` and `report` only
        published.json       the info hashes of the torrents that were made here, the last one and
                             the one before it (`known.SCHEMA`), if the folder was published and
                             not fetched
        findings.json        what the latest fetch and the latest verification have found, and
        runs.json            what the last runs took (`journal`), for the same two only; and
        seeder.json          for them too: {"pid", "host"} of who shares the folder, while he does
        *.damaged-N          a state file that could not be read, set aside

The payload cannot be renamed into place, so that only the record makes its bytes trustworthy.
"""
