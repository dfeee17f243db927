"""Installation: `pip install -c constraints.txt -e .` for users, `-e ".[test]"` for those who run the tests."""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search(r'__version__ = "(.*)"', Path("slope_dist/__init__.py").read_text()).group(1)

setup(
    name="slope_dist",
    version=VERSION,
    description="Sparse pretraining of large language models with SLoPe on DeepSpeed",
    long_description=Path("README.md").read_text(),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["slope_dist", "slope_dist.*"]),
    package_data={"slope_dist.sparse.kernels.cutlass": ["*.cu"]},
    python_requires=">=3.11",
    install_requires=[
        "datasets>=5",
        "deepspeed>=0.19.8,<0.20",
        "matplotlib>=3.9",
        "megatron-core>=0.16.1,<0.17",
        "numpy>=2.0",
        "protobuf>=5",
        "psutil>=6",
        "pyarrow>=20",
        "pydantic>=2.14",
        "rich>=15",
        "safetensors>=0.8",
        "sentencepiece>=0.2.1",
        "tensorboard>=2.21",
        "tokenizers>=0.23.3",
        "torch>=2.11",
    ],
    extras_require={
        "evaluation": ["lm-eval>=0.4.13"],
        "interpreter": ["triton==3.9.0"],
        "test": [
            "accelerate>=1.15",
            "compressed-tensors>=0.20",
            "hypothesis>=6.170",
            "lm-eval>=0.4.13",
            "mypy>=2.4",
            "peft>=0.21",
            "pytest>=9.2",
            "pytest-xdist>=3.6",
            "ruff>=0.17",
            "transformers>=5.23",
        ],
    },
)
