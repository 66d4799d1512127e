"""Map the top-level folders kernels/ and reference/ into the prefopt_fast package; all else is in pyproject.toml.

They are installed as prefopt_fast.kernels and prefopt_fast.reference, never as a top-level ``kernels``: Hugging Face
publishes a package of that name and transformers probes for it.
"""

from setuptools import setup

setup(
    packages=["prefopt_fast", "prefopt_fast.integrations", "prefopt_fast.kernels", "prefopt_fast.reference"],
    package_dir={
        "prefopt_fast": "prefopt_fast",
        "prefopt_fast.kernels": "kernels",
        "prefopt_fast.reference": "reference",
    },
    package_data={"prefopt_fast": ["py.typed"], "prefopt_fast.kernels": ["*.json", "*.c"]},
)
