# SPDX-License-Identifier: Apache-2.0
"""Label maps for token labelling (arXiv 2104.10858): a teacher's top classes of each place.

A map belongs to one image: ``FOLDER/CLASS/NAME.pt`` for the image ``CLASS/NAME.JPEG``, as the
authors of token labelling publish them for ImageNet. It is a tensor ``[2, k, h, w]`` in half
precision: the teacher's k largest logits (k = 5) at every place of a grid over the image, then
their classes. ``.npy`` files of the same arrays are read, too, and preferred.
"""

import collections
import io
import pickle  # nosec B403
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from localglobal_jax.data.tfds import gcs

# of NumPy's header, which is Python, and of zip archives
DAMAGE = (
    *(ValueError, OverflowError, EOFError, TypeError, LookupError, RuntimeError),
    *(SyntaxError, tokenize.TokenError, zlib.error),
)
EXACT = 2049  # classes, whose numbers float16 holds exactly
PUBLISHED = (2, 5, 18, 18)  # shape of the authors' maps
TYPES = {"HalfStorage": np.float16, "FloatStorage": np.float32}


def dtype(classes: int) -> type[np.floating[Any]]:
    """Returns float16, or float32 for more classes than float16 can number."""
    return np.float16 if classes <= EXACT else np.float32


class LabelMaps:
    """The label maps in a folder, all of one `shape`, in float16 if that holds every class.

    Args:
      directory: local, or gs://BUCKET/PATH.
      classes: number of classes of the data set.
      first: name of an image, whose map gives the shape.

    Raises ValueError if that map is missing or damaged.
    """

    def __init__(self, directory: str, classes: int, first: str):
        self._folder, self._classes = gcs.place(directory).expanduser(), classes
        self.dtype = dtype(classes)
        self.shape: tuple[int, ...] = ()
        self.shape = self.read(first).shape

    def read(self, name: str) -> np.ndarray:
        """Returns the map of the image ``CLASS/STEM`` as ``[2, k, h, w]`` of `dtype`.

        Raises ValueError for a map that is missing or damaged, and OSError for one that cannot be
        read.
        """
        for ending, parse in ((".npy", _numpy), (".pt", read_tensor)):
            file = self._folder / f"{name}{ending}"
            try:
                data = file.read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                continue
            try:
                return self._checked(parse(data))
            except DAMAGE as error:
                raise ValueError(f"its label map {file} is damaged: {error}") from error
        raise ValueError(f"it has no label map: {self._folder / name}.npy or .pt (data.label_maps)")

    def _checked(self, found: np.ndarray) -> np.ndarray:
        if found.ndim != 4 or found.shape[0] != 2 or not found.size:
            raise ValueError(f"it has the shape {found.shape}, want (2, k, height, width)")
        if self.shape and found.shape != self.shape:
            raise ValueError(f"it has the shape {found.shape}, others have {self.shape}")
        classes = found[1]
        whole = np.isfinite(classes).all() and (classes == np.rint(classes)).all()
        if not whole or classes.min() < 0 or classes.max() >= self._classes:
            raise ValueError(
                f"its classes are not whole numbers from 0 to {self._classes - 1}: its second half "
                "has the classes, its first half their logits"
            )
        with np.errstate(over="ignore"):
            found = found.astype(self.dtype)
        if not np.isfinite(found[0]).all():
            raise ValueError(f"its logits are not finite numbers of {np.dtype(self.dtype)}")
        return found


def name_of(record: Mapping[str, Any]) -> str:
    """Returns ``CLASS/STEM`` of a TFDS record, whose ``file_name`` is CLASS_NUMBER.JPEG (ImageNet).

    Raises ValueError for a record without a file name.
    """
    name = record.get("file_name")
    name = name.decode() if isinstance(name, bytes) else name
    if not isinstance(name, str):
        raise ValueError(
            "data.label_maps needs images with a name: a folder of pictures, or a TFDS set with "
            "the feature file_name (imagenet2012)"
        )
    stem = name.rpartition("/")[2].partition(".")[0]
    return f"{stem.rpartition('_')[0]}/{stem}"


def _numpy(data: bytes) -> np.ndarray:
    if not data.startswith(np.lib.format.MAGIC_PREFIX):  # such as an .npz
        raise ValueError("it is not an array of numpy.save")
    return np.load(io.BytesIO(data), allow_pickle=False)


# ---------------------------------------------------------------------------- torch's format


def read_tensor(data: bytes) -> np.ndarray:
    """Returns the one tensor in a file of ``torch.save`` (a zip archive), without torch.

    Nothing in the file is executed. Raises ValueError for any other content.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            (description,) = (name for name in names if name.endswith("/data.pkl"))
            found = _Tensor(archive, description).load()
    except (zipfile.BadZipFile, pickle.UnpicklingError, KeyError, AttributeError) as error:
        raise ValueError(f"it is not one tensor of torch.save: {error}") from error
    if not isinstance(found, np.ndarray):
        raise ValueError(f"it holds a {type(found).__name__}, not one tensor")
    return found


class _Tensor(pickle.Unpickler):  # nosec B301
    """Unpickles a tensor as a NumPy array. No name in the file is imported: see `find_class`."""

    def __init__(self, archive: zipfile.ZipFile, description: str):
        super().__init__(io.BytesIO(archive.read(description)))
        self._archive, self._root = archive, description.rpartition("/")[0]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuilt
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in TYPES:
            return TYPES[name]
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, kind, key, *_ = pid
        return np.frombuffer(self._archive.read(f"{self._root}/data/{key}"), kind)


def _rebuilt(storage: np.ndarray, offset: int, size: Any, stride: Any, *_: Any) -> np.ndarray:
    """Returns a strided view of `storage`, copied. NumPy raises ValueError beyond its end."""
    item = storage.dtype.itemsize
    strides = tuple(item * step for step in stride)
    view: np.ndarray = np.ndarray(tuple(size), storage.dtype, storage, item * offset, strides)
    return np.ascontiguousarray(view)
