"""The checkpoint directory: its state files, what is proven in it, and what is wrong with it.

    DIR/                     the payload in the torrent's layout, including its top folder; files
                             that were there in another layout and were adopted stay where they are
    DIR/.../NAME.part        a file that is not asked for, with the bytes that share a piece with
                             one that is; it gets its name when it is asked for. A NAME that is too
                             long for the ending is truncated (`names.with_ending`).
                             Without a torrent: a file that is not complete yet
    DIR/.grokfetch/          our state (elsewhere with `state`); deleting it costs time, never data
        lock                 locked (flock) exclusively while payload or record are written, and
                             shared by readers that need it; holds the owner's {"pid", "host"} as
                             JSON. The kernel releases the lock of a dead owner, so it never blocks
        manifest.json        the manifest in force (`schema.SCHEMA`), with the torrent's paths
        selection.json       what is asked for, unless it is everything (`selection.SCHEMA`)
        places.json          where files are that are not where the torrent puts them
                             (`relocation.SCHEMA`)
        metadata.torrent     a torrent file: the info dictionary as the swarm gave it, and its v2
                             piece layers. The format is BitTorrent's
        record.json          schema (`record.SCHEMA`), sha256 of the rest, info hash, bit field of
                             the proven pieces in hexadecimal (piece 0 is the highest bit), and for
                             each file: size, mtime_ns, sha256 or null, "writing" or ""
        progress.json        the course of the fetches, and who has sent how much
                             (`history.SCHEMA`), only for `status` and `report`
        published.json       if the folder was published and not fetched, the info hashes of the
                             last two torrents that were made of it (`known.SCHEMA`)
        findings.json        what the latest fetch and the latest verification have found,
        runs.json            what the latest runs took (`journal`), and
        seeder.json          while the folder is shared, the {"pid", "host"} of the process that
                             shares it; these three, too, only for `status` and `report`
        *.damaged-N          a state file that could not be read, set aside

The payload cannot be renamed into place, so only the record makes its bytes trustworthy.
"""
