"""Every misspelt key is told its nearest right name, every wrong value what would be right, in at most three faults.

Run alone: pytest tests/config/test_messages.py
"""

import pytest

from slope_dist.config.messages import field_paths
from slope_dist.config.schema import Config


def misspellings(name):
    middle = len(name) // 2
    dropped = name[:middle] + name[middle + 1 :]
    swapped = name[: middle - 1] + name[middle] + name[middle - 1] + name[middle + 1 :]
    return {dropped, swapped, name + name[-1]} - {name}


@pytest.mark.parametrize("path", field_paths())
def test_a_misspelt_key_gets_its_nearest_name(minimal, refusal, path):
    section, _, key = path.rpartition(".")
    for wrong in misspellings(key):
        tree = {name: dict(value) for name, value in minimal.items()}
        target = tree.setdefault(section, {}) if section else tree
        target[wrong] = target.pop(key, None)
        wrong_path = f"{section}.{wrong}" if section else wrong
        # Where the key is a required one, that it is missing is not told as a second fault.
        assert refusal(tree) == f"{wrong_path}: unknown key; did you mean {path}?"


@pytest.mark.parametrize("section", [name for name in Config.model_fields if name != "precision"])
def test_a_misspelt_section_gets_its_nearest_name(minimal, refusal, section):
    for wrong in misspellings(section):
        tree = {name: dict(value) for name, value in minimal.items()}
        tree[wrong] = tree.pop(section, {})
        assert refusal(tree) == f"{wrong}: unknown key; did you mean {section}?"


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("training.steps", "3", 'must be a whole number, not "3"; numbers, true and false stand without quotes'),
        ("training.steps", True, "must be a whole number, not true"),
        ("training.steps", 3.0, "must be a whole number, not 3.0"),
        ("training.steps", 3.5, "must be a whole number, not 3.5"),
        ("training.steps", None, "must be a whole number, not null"),
        ("training.steps", [3], "must be a whole number, not a list of 1"),
        ("training.steps", 0, "must be at least 1, not 0"),
        ("training.steps", 2**31, "must be at most 2147483647, not 2147483648"),
        (
            "training.learning_rate",
            "1e-3",
            'must be a number, not "1e-3"; numbers, true and false stand without quotes',
        ),
        ("training.learning_rate", False, "must be a number, not false"),
        ("training.learning_rate", 0, "must be above 0, not 0"),
        ("training.beta1", 1.0, "must be below 1, not 1.0"),
        ("adapters.fraction", 0, "must be above 0, not 0"),
        ("adapters.fraction", 1.1, "must be at most 1, not 1.1"),
        ("adapters.rank", "half", 'must be a whole number, or a fraction between 0 and 1, not "half"'),
        ("adapters.rank", True, "must be a whole number, or a fraction between 0 and 1, not true"),
        ("parallel.zero_stage", 4, "must be at most 3, not 4"),
        ("parallel.sequence_parallel", 0, "must be true or false, not 0"),
        ("parallel.gradient_dtype", "bf16", 'must be one of "fp32", "model", not "bf16"'),
        ("data.source", "wikipedia", 'must be one of "python-stdlib", or null, not "wikipedia"'),
        ("data.folder", 3, "must be a string, or null, not 3"),
        ("data.valid_fraction", None, "must be a number, not null"),
        ("data.folder", " ", "must be a path: not empty, no NUL character"),
        ("data.folder", "a\0b", "must be a path: not empty, no NUL character"),
        ("run.threads", "all", 'must be a whole number, or null, not "all"'),
        ("run.seed", -1, "must be at least 0, not -1"),
        ("checkpoint.keep", 1, "must be at least 2, not 1"),
        ("sparsity.dense_layers", "decoder.*", 'must be a list, not "decoder.*"'),
        ("sparsity.layer_patterns", "*=2:8", 'must be a list, not "*=2:8"'),
        ("sparsity.column_mask_interval", 0, "must be at least 1, not 0"),
        ("precision", "fp8", 'must be one of "bf16", "fp16", "fp32", not "fp8"'),
        ("model", 3, "must be an object of keys, not 3"),
        ("model", None, "must be an object of keys, not null"),
        ("model", [], "must be an object of keys, not a list of 0"),
    ],
)
def test_a_wrong_value_is_told_what_would_be_right(minimal, refusal, path, value, expected):
    section, _, key = path.rpartition(".")
    (minimal.setdefault(section, {}) if section else minimal)[key] = value
    assert refusal(minimal) == f"{path}: {expected}"


@pytest.mark.parametrize("entry", ["*.fc2=3:4", "=2:8", " =2:8", "2:8", "*.fc2=", "*.fc2=dense"])
def test_a_wrong_pattern_of_a_layer_is_told_what_would_be_right(minimal, refusal, entry):
    minimal["sparsity"] = {"layer_patterns": ["*=2:4", entry]}
    right = 'must be "GLOB=N:M" with N:M one of 1:2, 2:4, 2:8, 4:8, such as "*.fc2=2:8"'
    assert refusal(minimal) == f"sparsity.layer_patterns[1]: {right}"


def test_a_wrong_list_entry_is_told_its_place(minimal, refusal):
    minimal["sparsity"] = {"dense_layers": ["a", 3]}
    assert refusal(minimal) == "sparsity.dense_layers[1]: must be a string, not 3"


def test_at_most_three_faults_the_unknown_keys_first(minimal, refusal):
    minimal["training"] = {"steps": 0, "stpes": 1, "micro_batch_size": "x"}
    faults = refusal(minimal).split("; ")
    assert faults[0] == "training.stpes: unknown key" and faults[1] == "did you mean training.steps?"
    assert faults[2:] == [
        "training.steps: must be at least 1, not 0",
        'training.micro_batch_size: must be a whole number, not "x"',
        "and more",
    ]


def test_a_file_of_nothing_but_faults_stays_one_short_line(refusal):
    message = refusal({f"k{index}" * 200: index for index in range(3000)})
    assert len(message) < 1100


@pytest.mark.parametrize(
    ("alternatives", "expected"),
    [
        (3, "parallel.alternatives: must be a list, not 3"),
        ([{}, 3], "parallel.alternatives[1]: must be an object of keys, not 3"),
        ([{"tensr": 2}], "parallel.alternatives[0].tensr: unknown key; did you mean parallel.alternatives[0].tensor?"),
        ([{"gpu": 2}], "parallel.alternatives[0].gpu: unknown key; parallel.alternatives[0] has engine, tensor, "),
        ([{"tensor": "2"}], "parallel.alternatives[0].tensor: must be a whole number, or null, not "),
        ([{"tensor": 0}], "parallel.alternatives[0].tensor: must be at least 1, or null, not 0"),
        ([{}, {"tensor": 3}], "parallel.alternatives[1]: model.num_heads 4 does not divide over parallel.tensor 3; "),
        ([{"pipeline": 3}], "parallel.alternatives[0]: parallel.pipeline 3 stages are more than model.num_layers 2"),
        ([{"pipeline": 2, "zero_stage": 2}], "parallel.alternatives[0]: parallel.zero_stage 2 does not work with "),
        ([{"engine": "fsdp", "pipeline": 2}], "parallel.alternatives[0]: parallel.pipeline 2 does not work with "),
        ([{"micro_batch_size": 3}], "parallel.alternatives[0]: training.global_batch_size 8 is not a multiple of "),
        ([{"data": 3}], "parallel.alternatives[0]: training.global_batch_size 8 is not a multiple of "),
    ],
)
def test_an_alternative_layout_that_is_impossible_is_refused_at_once(minimal, refusal, alternatives, expected):
    minimal["parallel"] = {"alternatives": alternatives}
    assert refusal(minimal).startswith(expected)
