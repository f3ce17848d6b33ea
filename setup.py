"""Which packages are installed; everything else is in pyproject.toml.

Packages of flperf are found by themselves. The folder kernels/ is installed as flperf_kernels, since a root package
named kernels would hide the one that transformers probes for, and pyproject.toml cannot rename a folder and find the
others.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["flperf", "flperf.*"]), "flperf_kernels"],
    package_dir={"flperf_kernels": "kernels"},
)
