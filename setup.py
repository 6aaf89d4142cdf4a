"""What pyproject.toml cannot say: the sums of weights are compiled where there is a compiler. PyTorch does without."""

from setuptools import Extension, setup

lanes = Extension(
    "dpo_fast.reference._lanes",
    ["dpo_fast/reference/lanes.c"],
    extra_compile_args=["-O3"],
    optional=True,
    py_limited_api=True,  # it calls nothing of Python
)
setup(ext_modules=[lanes], options={"bdist_wheel": {"py_limited_api": "cp311"}})
