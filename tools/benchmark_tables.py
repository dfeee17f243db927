"""What `tools/benchmark.py` measured, as tables for a reader."""

from __future__ import annotations

import checkpoint_rivals
from rich.table import Table

from slope_dist.benchmark import inference, layer, preparing, traffic

SHORT_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
SPARSE = [rival for rival in layer.RIVALS if rival != layer.DENSE]
KIB = 2**10
MIB = 2**20
GB = 10**9


def layer_table(rows: list[dict], facts: dict[str, object]) -> Table:
    """The rows for a reader: medians, ratios with their quartiles, and memory."""
    table = Table(
        title=f"one linear layer, forward + backward, {rows[0]['tokens']} tokens, {facts['device']}, "
        f"{facts['threads']} threads, torch {facts['torch']}",
        caption="x: median of the ratios to torch.nn.Linear, round by round, with quartiles. MiB: weights and buffers "
        "and the measured peak of a step above them and the input and output gradient.",
    )
    headings = ["in -> out", "dtype", "dense ms", *(f"{rival} x" for rival in SPARSE)]
    for heading in headings + [f"{rival} MiB" for rival in layer.RIVALS]:
        table.add_column(heading, justify="right")
    for row in rows:
        rivals = row["rivals"]
        table.add_row(
            f"{row['in_features']} -> {row['out_features']}",
            SHORT_DTYPES[row["dtype"]],
            f"{rivals[layer.DENSE]['seconds'] * 1e3:.1f}",
            *(_ratio(rivals[rival]) for rival in SPARSE),
            *(_memory(rivals[rival]) for rival in layer.RIVALS),
        )
    return table


def traffic_table(rows: list[dict], size: traffic.Size, facts: dict[str, object]) -> Table:
    """The rows for a reader: KiB of a dense block, and 2:4 over dense with and without biases and norms."""
    table = Table(
        title=f"one block in one step, width {size.hidden_size}, inner width {size.ffn_size}, {traffic.RANKS} ranks, "
        f"torch {facts['torch']}, deepspeed {facts['deepspeed']}",
        caption="x: bytes of 2:4 over those of dense, for the whole block and for its linears alone. Reduced: "
        "gradients. Gathered: weights, at ZeRO 3 and FSDP2 with metadata.",
    )
    for heading in ("engine", "weights", "gradients"):
        table.add_column(heading)
    for kind in (traffic.REDUCED, traffic.GATHERED):
        for heading in (f"{kind} KiB", "block x", "linears x"):
            table.add_column(heading, justify="right")
    for row in rows:
        cells = []
        for kind in (traffic.REDUCED, traffic.GATHERED):
            ratios = row[kind]
            dense = f"{row[traffic.DENSE]['block_bytes'][kind] / KIB:.0f}"
            cells += ["-"] * 3 if ratios is None else [dense, f"{ratios['block']:.4f}", f"{ratios['linears']:.4f}"]
        gradients = "fp32" if row["gradient_dtype"] == "fp32" else row["precision"]
        table.add_row(row["engine"], row["precision"], gradients, *cells)
    return table


def checkpoint_table(rows: list[dict], facts: dict[str, object]) -> Table:
    """The rows for a reader: sizes, and seconds for each GB of state with ratios of ours to the others'."""
    table = Table(
        title=f"seconds a GB of state (bf16 weights, fp32 masters and moments), {rows[0]['ranks']} ranks, "
        f"{facts['device']}, {facts['cores']} cores, torch {facts['torch']}, deepspeed {facts['deepspeed']}",
        caption="Medians. save: to the disk, synced. load: files in the page cache; ours are verified first. stall: "
        "what training waits for where the rest is written beside it. (x): seconds of slope_dist over this one's, "
        "round by round. SHA-256 alone, which only slope_dist computes, once in a save and once in a load: hash.",
    )
    for heading in ("state", "ZeRO", "GB"):
        table.add_column(heading)
    for heading in ("", "stored GB", "save", "load", "stall", "hash"):
        table.add_column(heading, justify="right")
    for row in rows:
        first = [row["pattern"], str(row["zero_stage"]), f"{row['state_bytes'] / GB:.2f}"]
        for name, rival in row["rivals"].items():
            ratios = row["ratios"].get(name, {})
            cells = []
            for what in ("save_to_disk", "load", "stall"):
                seconds = f"{rival[what]['median'] * GB / row['state_bytes']:.2f}" if what in rival else "-"
                cells.append(seconds + (f" ({ratios[what]['median']:.2f}x)" if what in ratios else ""))
            hashed = f"{row['hash']['median'] * GB / row['state_bytes']:.2f}" if name == checkpoint_rivals.OURS else ""
            table.add_row(*first, name, f"{rival['stored_bytes'] / GB:.3f}", *cells, hashed)
            first = ["", "", ""]
    return table


def loader_table(row: dict, facts: dict[str, object]) -> Table:
    """The row for a reader."""
    table = Table(
        title=f"batches of {row['batch_size']} x {row['sequence_length']} tokens from "
        f"{row['corpus_bytes'] / GB:.2f} GB, {facts['device']}, megatron-core {facts['megatron-core']}",
        caption="x: median of the ratios of time, round by round, with quartiles. Memory: what the resident memory "
        f"grows by while {row['samples']} samples are read.",
    )
    for heading in ("", "million tokens/s", "time x", "memory MiB"):
        table.add_column(heading, justify="right")
    for name, rival in row["rivals"].items():
        speed = f"{rival['tokens_per_second'] / 1e6:.1f}"
        table.add_row(name, speed, _ratio(rival), f"{rival['grown_bytes'] / MIB:.1f}")
    return table


def data_table(rows: list[dict], facts: dict[str, object]) -> Table:
    """The rows for a reader: MB/s of each, and the ratio of their times."""
    table = Table(
        title=f"{rows[0]['bytes'] / preparing.MB:.0f} MB of .jsonl to tokens, {rows[0]['workers']} processes, "
        f"{facts['device']}, datasets {facts['datasets']}, tokenizers {facts['tokenizers']}, sentencepiece "
        f"{facts['sentencepiece']}",
        caption="Medians. datasets: load_dataset and map. x: seconds of prepare over those of "
        "datasets, round by round. prepare also reads each document back, splits, and hashes.",
    )
    for heading in ("tokenizer", "prepare MB/s", "datasets MB/s", "x"):
        table.add_column(heading, justify="left" if heading == "tokenizer" else "right")
    for row in rows:
        speeds = (f"{row['rivals'][name]['mb_per_second']:.1f}" for name in (preparing.OURS, preparing.THEIRS))
        table.add_row(row["tokenizer"], *speeds, f"{row['ratio']:.2f}")
    return table


def inference_table(row: dict, facts: dict[str, object]) -> Table:
    """The row for a reader: sizes of each form in GB, and of compressed over dense."""
    table = Table(
        title=f"{row['config']}, {row['family']} of {row['parameters'] / GB:.2f} billion parameters in "
        f"{SHORT_DTYPES[row['dtype']]}, adapters of rank {row['adapter_rank']}, {facts['device']}, {facts['threads']} "
        f"threads, torch {facts['torch']}",
        caption="GB. linears: weights, metadata and adapters of the linear layers. resident: what loading adds to the "
        "memory that is of no file; peak: the most of it while loading, and while then computing. Dense has its "
        f"adapters added in. tokens/s: a prompt of {row['prompt']}, then one by one, by the reference's products.",
    )
    headings = ("", "files", "linears", "all weights", "resident", "loading peak", "computing peak", "load s")
    for heading in (*headings, "prompt tokens/s", "tokens/s"):
        table.add_column(heading, justify="right")
    for name, rival in row["rivals"].items():
        cells = [f"{rival[size] / GB:.3f}" for size in inference.SIZES]
        speeds = [f"{rival[what]:.2f}" for what in ("prompt_tokens_per_second", "tokens_per_second")]
        table.add_row(name, *cells, f"{rival['load_seconds']:.1f}", *speeds)
    table.add_row("x", *(f"{row['ratios'][size]:.3f}" for size in inference.SIZES), "", "", "")
    return table


def _ratio(rival: dict[str, float]) -> str:
    return f"{rival['ratio']:.2f} ({rival['ratio_q1']:.2f}-{rival['ratio_q3']:.2f})"


def _memory(rival: dict[str, float]) -> str:
    if "peak_bytes" not in rival:
        return "not measured"
    return f"{(rival['held_bytes'] + rival['peak_bytes']) / MIB:.0f}"
