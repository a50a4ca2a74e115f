"""`.nv-meta` beside the shards: what Megatron Energon needs to read them as a `CrudeWebdataset` (7.4.1)."""

import json
from collections.abc import Sequence
from pathlib import Path

from laver_mcore.data.records.shards import ShardSummary

_DATASET = """\
__module__: megatron.energon
__class__: CrudeWebdataset
subflavors: {}
"""


def write_energon_metadata(folder: Path, shards: Sequence[ShardSummary]) -> None:
    """Write `.nv-meta`: one split, `train`, of all shards."""
    meta = folder / ".nv-meta"
    meta.mkdir(exist_ok=True)
    info = {"energon_version": "7.4.1", "shard_counts": {shard.name: shard.num_samples for shard in shards}}
    (meta / ".info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    names = "".join(f"  - {shard.name}\n" for shard in shards)
    (meta / "split.yaml").write_text(
        f"exclude: []\nsplit_parts:\n  train:\n{names}  val: []\n  test: []\n", encoding="utf-8"
    )
    (meta / "dataset.yaml").write_text(_DATASET, encoding="utf-8")
