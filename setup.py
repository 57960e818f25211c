"""Maps the folder ``kernels/`` to ``fastadv.kernels``; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastadv", "fastadv.*"]), "fastadv.kernels"],
    package_dir={"fastadv": "fastadv", "fastadv.kernels": "kernels"},
    package_data={"fastadv": ["py.typed"]},
)
