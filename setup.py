"""Package list of nsc_fast.

The Triton programs live in ./kernels and are installed as ``nsc_fast.kernels``. The mapping is written out
because a plain package search would install a top-level package named ``kernels``, a name that
transformers probes for.
"""

import re
from pathlib import Path

from setuptools import setup

version = re.search(
    r'^__version__ = "(.+)"$', Path("nsc_fast/__init__.py").read_text(encoding="utf-8"), re.M
)[1]

setup(
    version=version,
    packages=[
        "nsc_fast",
        "nsc_fast.adapters",
        "nsc_fast.data",
        "nsc_fast.demo",
        "nsc_fast.kernels",
        "nsc_fast.methods",
        "nsc_fast.objectives",
        "nsc_fast.ops",
        "nsc_fast.report",
    ],
    package_dir={"nsc_fast": "nsc_fast", "nsc_fast.kernels": "kernels"},
    package_data={
        "nsc_fast.demo": ["data/*", "adapters/*", "adapters/*/*"],
        "nsc_fast.report": ["style.css"],
    },
)
