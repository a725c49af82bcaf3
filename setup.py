"""The one thing that pyproject.toml cannot say yet: a C library that may fail to build.

Without a compiler Shoal installs all the same, and `comm/shared_memory` runs in Python. The library
uses no header of Python or torch; ctypes loads it.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "shoal.comm.shared_memory._core",
            ["src/shoal/comm/shared_memory/core.c"],
            optional=True,
            # No -march: wheels move between machines. The loops are built for several processors
            # inside. No contraction: a sum has the same bits on all of them.
            extra_compile_args=[
                "-std=gnu11",
                "-O3",
                "-fno-strict-aliasing",
                "-fwrapv",
                "-ffp-contract=off",
            ],
        )
    ]
)
