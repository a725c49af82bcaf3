"""Checkpoints that can be trusted, in one format that does not depend on how a run was split.

    checkpoints/
      step-000000400/
        rank-00000.safetensors     the pieces that rank 0 wrote
        rank-00001.safetensors
        manifest.json              what the pieces are pieces of, their checksums, and the rest
      .step-000000500.tmp/         being written: no checkpoint until it is renamed

Every rank writes its own pieces; rank 0 checks, writes the manifest and renames the folder. A
reader asks for any box of any tensor, whatever boxes it was saved in. Nothing is unpickled.

    save(run.checkpoints_path, snapshot, Alone())
    newest = newest_valid(run.checkpoints_path, on_damaged=print)
    weight = newest.read("fc.weight", Slice((10, 64), (0, 0), (5, 64)))
"""

from shoal.checkpoint import replicas
from shoal.checkpoint.background import Background
from shoal.checkpoint.copies import Copies
from shoal.checkpoint.exporting import Exported, export, export_state
from shoal.checkpoint.folder import (
    checkpoint_path,
    discard_after,
    list_checkpoints,
    prune,
)
from shoal.checkpoint.manifest import FORMAT, Entry, Manifest
from shoal.checkpoint.meeting import Alone, Meeting
from shoal.checkpoint.reading import Checkpoint, newest_valid
from shoal.checkpoint.saving import SavedCheckpoint, save
from shoal.checkpoint.snapshot import Piece, Snapshot

__all__ = [
    "FORMAT",
    "Alone",
    "Background",
    "Checkpoint",
    "Copies",
    "Entry",
    "Exported",
    "Manifest",
    "Meeting",
    "Piece",
    "SavedCheckpoint",
    "Snapshot",
    "checkpoint_path",
    "discard_after",
    "export",
    "export_state",
    "list_checkpoints",
    "newest_valid",
    "prune",
    "replicas",
    "save",
]
