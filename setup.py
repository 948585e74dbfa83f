"""The package; tools are set up in pyproject.toml.

The ranges were installed together on Python 3.11, 3.12 and 3.13. Those with a ceiling need it:
TensorFlow 2.21 breaks ScaNN 1.4's import, and sentencepiece 0.2.3 needs a protobuf that Beam refuses.
"""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="retrieval_jax",
    version="0.1.0",
    description="Generative retrievers and dual encoders in JAX: train, search, compare.",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["information retrieval", "generative retrieval", "dense retrieval", "JAX", "T5"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11,<3.14",
    packages=[*find_packages(include=["retrieval_jax", "retrieval_jax.*"]), "retrieval_jax.gin_configs"],
    package_dir={"retrieval_jax.gin_configs": "gin_configs"},
    package_data={
        "retrieval_jax.gin_configs": ["**/*.gin", "papers/README.md"],
        "retrieval_jax.serving": ["page.html"],
    },
    entry_points={"console_scripts": ["retrieval-jax = retrieval_jax.main:main"]},
    install_requires=[
        "apache-beam>=2.77,<2.78",  # it refuses protobuf 7
        "array_record>=0.8,<0.9",
        "bm25s>=0.2,<0.4",
        "clu>=0.0.12,<0.1",
        "etils[epath,epy]>=1.13,<2",
        "fastapi>=0.165,<0.170",  # `serve`, with the next ones
        "flax>=0.12,<0.13",
        "gin-config>=0.5,<0.6",
        "google-crc32c>=1.9,<2",  # the checksums of TFRecords
        "grain>=0.2.18,<0.3",
        "httptools>=0.9,<1",
        "importlib_resources>=6",  # tensorflow-datasets imports it on Python 3.11
        "ir-measures>=0.4.3,<0.5",
        "jax>=0.10,<0.13",
        "matplotlib>=3.9,<4",
        "numpy>=2,<3",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.11.16,<0.13",
        "prometheus-client>=0.26,<1",
        "protobuf>=6,<7",
        "pyarrow>=25,<26",
        "PyStemmer>=3,<4",  # Snowball's stemmers, for BM25
        "rich>=13,<16",
        "safetensors>=0.5,<1",
        "scann>=1.4.2,<1.5; sys_platform == 'linux'",  # it has no wheels for others, and no source
        "scipy>=1.15,<2",
        "sentencepiece>=0.2.1,<0.2.3",
        "seqio>=0.0.20,<0.1",
        "tensorflow>=2.20,<2.21",
        "tensorflow-datasets>=4.9.9,<5",
        "tensorflow-text>=2.20,<2.21",
        "uvicorn>=0.54,<0.60",
        "uvloop>=0.23,<1",
    ],
    extras_require={
        "gcs": ["google-cloud-storage>=3,<4"],  # Orbax asks it about buckets: checkpoints at gs://
        "hf": ["huggingface_hub>=0.34,<3"],  # weights by name: hf:ORG/NAME
        "ir_datasets": ["ir-datasets>=0.6.3,<0.7"],
        "sentence_transformers": ["sentence-transformers>=3,<7"],
        "tpu": ["jax[tpu]>=0.10,<0.13"],  # libtpu of jax's version, for preflight: 213 MB, 700 installed
        "test": [
            "google-cloud-storage>=3,<4",
            "httpx>=0.28,<1",
            "huggingface_hub>=0.34,<3",
            "hypothesis>=6",
            "playwright>=1.65,<2",  # drives an installed Chromium, for the page of `serve`
            "pytest>=8",
            "pytest-xdist>=3.6,<4",
            "ruff>=0.15,<0.16",
            "scikit-learn>=1.7,<2",  # whose k-means ours is compared with
            "schemathesis>=4.32,<5",
        ],
    },
)
