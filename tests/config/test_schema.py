"""The schema's defaults, ranges and cross-checks: what is impossible is refused with the numbers and the fix.

Run alone: pytest tests/config/test_schema.py
"""

from typing import get_args

import pytest
from pydantic import ValidationError

from slope_dist.config import derive
from slope_dist.config.fields import DIMENSION_MULTIPLE
from slope_dist.config.messages import field_at, field_paths
from slope_dist.config.schema import Config
from slope_dist.config.sections import GPU, AdaptersConfig, Pattern
from slope_dist.errors import UserError
from slope_dist.planning import GPU_MEMORY
from slope_dist.sparse.pattern import CUT_MULTIPLE, SUPPORTED


def put(tree, path, value):
    section, _, key = path.rpartition(".")
    (tree.setdefault(section, {}) if section else tree)[key] = value
    return tree


def test_every_field_is_described():
    for path in field_paths():
        assert len(field_at(path.split(".")).description) > 10, path


def test_documented_defaults(minimal):
    config = Config.model_validate(minimal)
    assert (config.sparsity.pattern, config.sparsity.column_mask_interval) == ("2:4", 1)
    assert (config.adapters.fraction, config.adapters.rank) == (0.01, 0.0156)
    assert config.adapters.learning_rate_policy == "follow"
    assert config.parallel.gradient_dtype == "fp32"
    assert (config.training.gradient_clipping, config.training.max_skipped_steps) == (1.0, 3)
    assert config.checkpoint.keep == 2


def test_a_loaded_config_does_not_change(minimal):
    config = Config.model_validate(minimal)
    with pytest.raises(ValidationError, match="frozen"):
        config.training.steps = 5


@pytest.mark.parametrize(
    ("rank", "hidden_size", "expected"),
    [
        (0, 768, 0),
        (5, 768, 5),
        (0.0156, 256, 16),
        (0.0156, 768, 16),
        (0.0156, 2048, 32),
        (0.0156, 9216, 144),
        (0.0625, 768, 48),
        (0.03, 800, 32),
        (0.99, 64, 64),
    ],
)
def test_adapter_rank(rank, hidden_size, expected):
    assert AdaptersConfig(rank=rank).adapter_rank(hidden_size) == expected


@pytest.mark.parametrize(
    ("rank", "fraction", "steps", "expected"),
    [(16, 0.01, 1000, 10), (16, 0.01, 10, 1), (16, 0.1, 25, 3), (16, 1.0, 7, 7), (0, 0.5, 100, 0)],
)
def test_adapter_steps(minimal, rank, fraction, steps, expected):
    minimal["adapters"] = {"rank": rank, "fraction": fraction}
    minimal["training"]["steps"] = steps
    assert Config.model_validate(minimal).adapter_steps == expected


def test_a_dense_model_has_no_adapters(minimal):
    minimal["sparsity"] = {"pattern": "dense"}
    config = Config.model_validate(minimal)
    assert (config.adapter_rank, config.adapter_steps) == (0, 0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model.hidden_size": 66}, "model.hidden_size 66 is not a multiple of 8; nearest: 64 or 72"),
        ({"model.ffn_size": 4}, "model.ffn_size 4 is not a multiple of 8; nearest: 8 or 8"),
        ({"model.embedding_size": 30}, "model.embedding_size 30 is not a multiple of 8; nearest: 24 or 32"),
        (
            {"model.num_heads": 6},
            "model.hidden_size 64 is not a multiple of model.num_heads 6 (remainder 4); 4 heads would fit",
        ),
        (
            {"training.micro_batch_size": 3},
            "training.global_batch_size 8 is not a multiple of training.micro_batch_size 3 (remainder 2)",
        ),
        (
            {"parallel.data": 4},
            "training.global_batch_size 8 is not a multiple of training.micro_batch_size 4 x parallel.data 4 = 16",
        ),
        ({"training.min_learning_rate": 1.0}, "training.min_learning_rate 1.0 is above training.learning_rate 0.001"),
        ({"adapters.rank": 65}, "adapters.rank 65 gives rank 65, above model.hidden_size 64"),
        ({"model.hidden_size": 8, "adapters.rank": 0.5}, "adapters.rank 0.5 gives rank 16, above model.hidden_size 8"),
        ({"adapters.rank": 1.5}, "adapters.rank 1.5 is not a fraction between 0 and 1"),
        ({"adapters.rank": 0.0}, "adapters.rank 0.0 is not a fraction between 0 and 1"),
        ({"adapters.rank": -1}, "adapters.rank -1 is negative; use 0 for no adapters"),
        ({"adapters.peak_learning_rate": 1e-4}, 'has no use with adapters.learning_rate_policy "follow"'),
        ({"adapters.warmup_steps": 3}, 'has no use with adapters.learning_rate_policy "follow"'),
        ({"adapters.learning_rate_policy": "rewarm_all"}, "adapters.peak_learning_rate is required by"),
        (
            {"sparsity.pattern": "dense", "sparsity.column_mask_interval": 5},
            'sparsity.column_mask_interval 5 needs a sparse pattern, but sparsity.pattern is "dense"',
        ),
        (
            {"sparsity.pattern": "2:8", "sparsity.backward_weight": "resident"},
            'sparsity.backward_weight "resident" needs sparsity.pattern "2:4" for all layers, not "2:8"',
        ),
        (
            {"sparsity.backward_weight": "resident", "parallel.zero_stage": 3},
            'sparsity.backward_weight "resident" would keep a full replica on every rank',
        ),
        ({"sparsity.dense_layers": ["a", " "]}, "sparsity.dense_layers holds an empty pattern"),
        ({"sparsity.layer_patterns": ["*=2:8"], "sparsity.pattern": "dense"}, "needs a sparse sparsity.pattern, not"),
        (
            {"sparsity.layer_patterns": ["*fc2=2:8"], "sparsity.backward_weight": "resident"},
            'sparsity.backward_weight "resident" needs sparsity.pattern "2:4" for all layers, not "2:8"',
        ),
        ({"loss_scale.minimum": 1.5}, "loss_scale.minimum 1.5 must be a whole number"),
        ({"loss_scale.initial_power": 2, "loss_scale.minimum": 8.0}, "is above the first scale 2^2 = 4"),
        (
            {"sparsity.backward_weight": "resident", "parallel.engine": "fsdp"},
            'which parallel.engine "fsdp" is there to avoid; use "auto" or "derived", or parallel.engine "deepspeed"',
        ),
        (
            {"precision": "fp16", "parallel.engine": "fsdp"},
            'precision "fp16" does not work with parallel.engine "fsdp", which scales no loss; use precision "bf16", '
            'or parallel.engine "deepspeed"',
        ),
        (
            {"parallel.engine": "fsdp", "parallel.pipeline": 2},
            'parallel.pipeline 2 does not work with parallel.engine "fsdp"; use parallel.pipeline 1, or '
            'parallel.engine "deepspeed"',
        ),
        (
            {"parallel.pipeline": 2, "parallel.zero_stage": 2},
            "parallel.zero_stage 2 does not work with parallel.pipeline 2",
        ),
        (
            {"parallel.pipeline": 2, "parallel.zero_stage": 3},
            "use parallel.zero_stage 1 or 0, or parallel.pipeline 1",
        ),
        (
            {"parallel.pipeline": 3},
            "parallel.pipeline 3 stages are more than model.num_layers 2, and every stage needs a layer; "
            "parallel.pipeline 2 is the most",
        ),
        (
            {"parallel.tensor": 3},
            "model.num_heads 4 does not divide over parallel.tensor 3; parallel.tensor 2 would fit",
        ),
        (
            {"parallel.tensor": 2**20},
            "model.num_heads 4 does not divide over parallel.tensor 1048576; parallel.tensor 4 would fit",
        ),
        (
            {"parallel.tensor": 4, "model.hidden_size": 48},
            "model.hidden_size 48 over parallel.tensor 4 would be cut inside a group of 8: it must be a multiple of "
            "4 x 8 = 32, such as 32 or 64; parallel.tensor 2 would fit",
        ),
        (
            {"parallel.tensor": 4, "model.ffn_size": 16},
            "model.ffn_size 16 over parallel.tensor 4 would be cut inside a group of 8: it must be a multiple of "
            "4 x 8 = 32, such as 32; parallel.tensor 2 would fit",
        ),
        (
            # A legal cut between groups of 4 is still one inside a byte of metadata and a group of 8.
            {"parallel.tensor": 2, "model.ffn_size": 40, "sparsity.pattern": "4:8"},
            "model.ffn_size 40 over parallel.tensor 2 would be cut inside a group of 8",
        ),
        (
            {"parallel.tensor": 2, "model.ffn_size": 40, "sparsity.pattern": "2:8", "model.num_heads": 2},
            "a multiple of 2 x 8 = 16, such as 32 or 48; parallel.tensor 1 would fit",
        ),
        (
            {"parallel.tensor": 4, "parallel.sequence_parallel": True, "model.sequence_length": 30},
            "model.sequence_length 30 does not divide over parallel.tensor 4, which parallel.sequence_parallel true "
            "asks for; parallel.tensor 2 would fit",
        ),
        (
            {"model.family": "llama", "model.num_kv_heads": 2, "parallel.tensor": 4},
            "model.num_kv_heads 2 does not divide over parallel.tensor 4; parallel.tensor 2 would fit",
        ),
        (
            {"model.family": "llama", "model.num_kv_heads": 2, "parallel.tensor": 2, "model.hidden_size": 16},
            "model.num_kv_heads 2 makes 8 keys, which parallel.tensor 2 would cut inside a group of 8",
        ),
        ({"model.num_kv_heads": 2}, 'model.num_kv_heads 2 has no meaning for model.family "opt"; it is for llama and'),
        ({"model.family": "gpt2", "model.norm_position": "post"}, 'model.norm_position "post" has no meaning for'),
        ({"model.family": "llama", "model.embedding_size": 32}, "model.embedding_size 32 has no meaning for"),
        ({"model.family": "gpt2", "model.rotary_base": 5e5}, "model.rotary_base 500000.0 has no meaning for"),
        ({"model.family": "gpt2", "model.tied_head": False}, 'the head of model.family "gpt2" is always tied'),
        ({"model.family": "llama", "model.num_kv_heads": 3}, "is not a multiple of model.num_kv_heads 3; 2 would fit"),
        ({"model.family": "llama", "model.rotary_low_factor": 4.0}, "model.rotary_low_factor 4.0 is not below model."),
    ],
)
def test_impossible_settings_are_refused_with_numbers(minimal, refusal, changes, expected):
    for path, value in changes.items():
        put(minimal, path, value)
    message = refusal(minimal)
    assert expected in message
    assert message.split()[0] in field_paths()


LIMITS = {
    "run.threads": 4096,
    "model.hidden_size": 2**20,
    "model.num_layers": 10_000,
    "model.num_heads": 2**20,
    "model.ffn_size": 2**20,
    "model.vocab_size": 2**24,
    "model.sequence_length": 2**24,
    "model.embedding_size": 2**20,
    "training.global_batch_size": 2**20,
    "training.micro_batch_size": 2**20,
    "parallel.data": 2**20,
}


@pytest.mark.parametrize("path", LIMITS)
def test_absurd_sizes_are_refused(minimal, refusal, path):
    limit = LIMITS[path]
    shown = f"at most {limit}" + (
        ", or null" if path in ("run.threads", "model.embedding_size", "parallel.data") else ""
    )
    for value in (limit + 8, 2**31 - 8):
        assert refusal(put(minimal, path, value)) == f"{path}: must be {shown}, not {value}"


def test_the_largest_sizes_are_taken_together(minimal, load):
    for path, limit in LIMITS.items():
        put(minimal, path, limit)
    config = load(put(minimal, "parallel.data", None))
    assert derive(config).tokens_per_step == 2**44
    with pytest.raises(UserError, match=r"training\.micro_batch_size 1 would fit"):
        derive(config, ranks=2**20)


def test_patterns_and_multiples_are_those_of_the_sparse_core():
    assert set(get_args(Pattern)) == {"dense"} | {f"{n}:{m}" for n, m in SUPPORTED}
    assert DIMENSION_MULTIPLE == CUT_MULTIPLE


def test_the_hardware_section_is_not_there_yet(minimal, refusal):
    assert refusal(put(minimal, "hardware.card", "H200")).startswith("hardware: unknown key")


@pytest.mark.parametrize("pattern", ["dense", "1:2", "2:4", "2:8", "4:8"])
def test_patterns_that_work(minimal, load, pattern):
    minimal["sparsity"] = {"pattern": pattern}
    group = load(minimal).sparsity.group
    assert group == (None if pattern == "dense" else tuple(int(part) for part in pattern.split(":")))


def test_other_patterns_are_refused_naming_those_that_work(minimal, refusal):
    minimal["sparsity"] = {"pattern": "1:4"}
    message = refusal(minimal)
    assert message.startswith("sparsity.pattern: must be one of ")
    assert all(f'"{pattern}"' in message for pattern in ("dense", "1:2", "2:4", "2:8", "4:8"))


@pytest.mark.parametrize(
    "parallel",
    [
        {"engine": "fsdp"},
        {"engine": "fsdp", "tensor": 4, "sequence_parallel": True},
        {"tensor": 2, "zero_stage": 3},
        {"tensor": 4, "pipeline": 2, "zero_stage": 1, "sequence_parallel": True, "data": 2},
        {"pipeline": 2, "zero_stage": 0},
    ],
)
def test_layouts_that_work(minimal, load, parallel):
    minimal["parallel"] = parallel
    found = load(minimal).parallel.model_dump()
    assert found.items() >= parallel.items()


def test_the_gpus_are_those_whose_memory_is_known():
    assert set(get_args(GPU)) == set(GPU_MEMORY)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_precision_and_stage_is_allowed(minimal, load, precision, stage):
    minimal |= {"precision": precision, "parallel": {"zero_stage": stage}}
    assert load(minimal).parallel.zero_stage == stage
