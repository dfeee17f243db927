"""The last collectives of this rank, from torch's flight recorder.

It is torch's own, written in C++ where a collective is begun, so it knows those that DeepSpeed and FSDP begin as well
as ours, and nothing of theirs is changed. On by default, with room for 2,000 (TORCH_FR_BUFFER_SIZE; 0 switches it off).
Gloo's does not record sends and receives.
"""

from __future__ import annotations

import json
from typing import Any

import torch.distributed as dist


def collectives_begun() -> int:
    """Number of collectives in the default group; -1 where that is not known."""
    try:
        group = dist.distributed_c10d._get_default_group()
        return int(group._get_sequence_number_for_group())  # type: ignore[attr-defined]
    except (RuntimeError, ValueError):
        return -1


def last_collectives() -> list[dict[str, Any]]:
    """The newest collective of each group, and those that have not ended.

    Returns:
        Of each: "group", "number" (in its group, from 1), "name" ("gloo:all_reduce"), "sizes", "ended", "thread".
    """
    import torch._C._distributed_c10d as c10d

    found: dict[tuple[str, int], dict[str, Any]] = {}
    for dump in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        if not hasattr(c10d, dump):
            continue
        for entry in json.loads(getattr(c10d, dump)(True, False)).get("entries", []):
            if entry["is_p2p"]:
                continue
            group, number = entry["process_group"][0], entry["collective_seq_id"]
            found[group, number] = {
                "group": group,
                "number": number,
                "name": entry["profiling_name"],
                "sizes": entry["input_sizes"],
                "ended": bool(entry["retired"]) or entry["state"] == "completed",
                "thread": int(entry.get("thread_id") or 0),
            }
    newest = {group: max(number for other, number in found if other == group) for group, _ in found}
    return [entry for (group, number), entry in found.items() if number == newest[group] or not entry["ended"]]
