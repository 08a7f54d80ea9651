# SPDX-License-Identifier: Apache-2.0
"""Label maps for token labelling: made up here, read, cropped and flipped with their images."""

import contextlib
import io
import shutil
import struct
import zipfile

import cv2
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from localglobal_jax.config import schema, validation
from localglobal_jax.data import loader
from localglobal_jax.data.images import device_ops, label_maps, pipeline
from localglobal_jax.training.tasks import classification, create_task

CLASSES, K, GRID = 4, 2, 6  # of the data set; of the maps


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def torch_file(array, *, shape=None, strides=None, name="HalfStorage", call=REBUILD):
    """The bytes that ``torch.save(tensor)`` writes (protocol 2 of pickle in a zip archive)."""

    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def numbers(values):
        return b"(" + b"".join(b"J" + struct.pack("<i", n) for n in values) + b"t"

    base = np.ascontiguousarray(array)
    strides = strides or [step // base.itemsize for step in base.strides]
    storage = (
        *(b"(", text("storage"), b"ctorch\n", name.encode(), b"\n", text("0"), text("cpu")),
        *(b"J", struct.pack("<i", base.size), b"tQ"),
    )
    hooks = b"ccollections\nOrderedDict\n)R"
    pickled = [b"\x80\x02", call, b"(", *storage, b"J", struct.pack("<i", 0)]
    pickled += [numbers(shape or array.shape), numbers(strides), b"\x89", hooks, b"tR."]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("n01_1/data.pkl", b"".join(pickled))
        archive.writestr("n01_1/byteorder", b"little")
        archive.writestr("n01_1/data/0", base.tobytes())
        archive.writestr("n01_1/version", b"3\n")
    return out.getvalue()


def some_map(seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(K, GRID, GRID))
    classes = np.stack([rng.permutation(CLASSES)[:K] for _ in range(GRID * GRID)], -1)
    return np.stack([logits, classes.reshape(K, GRID, GRID)]).astype(np.float16)


# ---------------------------------------------------------------------------- files


@pytest.mark.parametrize(("kind", "name"), [("<f2", "HalfStorage"), ("<f4", "FloatStorage")])
def test_a_tensor_of_torch(kind, name):
    array = some_map().astype(kind)
    np.testing.assert_array_equal(label_maps.read_tensor(torch_file(array, name=name)), array)


def test_a_tensor_that_was_permuted_before_it_was_saved():
    """As the authors' script does: [2, h, w, k] in memory, [2, k, h, w] as a tensor."""
    array = np.arange(2 * 3 * 4 * 5, dtype=np.float16).reshape(2, 3, 4, 5)
    shown = array.transpose(0, 3, 1, 2)
    data = torch_file(array, shape=shown.shape, strides=[60, 1, 20, 5])
    np.testing.assert_array_equal(label_maps.read_tensor(data), shown)


class Touched(Exception):
    pass


HOSTILE = {
    "a call": torch_file(some_map(), call=b"cos\nsystem\n"),
    "a builtin": torch_file(some_map(), call=b"cbuiltins\nexec\n"),
    "another storage": torch_file(some_map(), name="load"),
    "beyond the storage": torch_file(some_map(), strides=[10_000, 36, 6, 1]),
    "no archive": b"\x80\x02not a zip",
    "nothing": b"",
    "cut short": torch_file(some_map())[:300],
}


@pytest.mark.parametrize("what", HOSTILE)
def test_files_that_are_no_tensor(what, monkeypatch):
    def touched(*_):
        raise Touched

    monkeypatch.setattr("os.system", touched)
    with pytest.raises(ValueError, match=r"torch\.save|strides|buffer|storage|storages|shape"):
        label_maps.read_tensor(HOSTILE[what])


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (np.zeros((2, 5, 3), np.float16), "shape"),
        (np.zeros((3, K, GRID, GRID), np.float16), "shape"),
        (np.full((2, K, GRID, GRID), CLASSES, np.float16), "classes"),
        (np.full((2, K, GRID, GRID), 0.5, np.float16), "classes"),
        (np.full((2, K, GRID, GRID), np.nan, np.float16), "classes"),
        (np.zeros((2, K, GRID, GRID + 1), np.float16), "shape"),
    ],
)
def test_damaged_maps_are_named(found, message, tmp_path):
    (tmp_path / "a").mkdir()
    np.save(tmp_path / "a" / "1.npy", some_map())
    maps = label_maps.LabelMaps(str(tmp_path), CLASSES, "a/1")
    np.save(tmp_path / "a" / "2.npy", found)
    with pytest.raises(ValueError, match=rf"a/2\.npy.*{message}"):
        maps.read("a/2")
    with pytest.raises(ValueError, match="a/3"):
        maps.read("a/3")
    np.savez(tmp_path / "a" / "5.npz", some_map())
    (tmp_path / "a" / "5.npz").rename(tmp_path / "a" / "5.npy")
    with pytest.raises(ValueError, match=r"a/5\.npy"):
        maps.read("a/5")
    whole = bytearray((tmp_path / "a" / "1.npy").read_bytes())
    for bit in range(8 * 128):  # of the header
        whole[bit // 8] ^= 1 << bit % 8
        (tmp_path / "a" / "6.npy").write_bytes(whole)
        with contextlib.suppress(ValueError):
            maps.read("a/6")
        whole[bit // 8] ^= 1 << bit % 8
    (tmp_path / "a" / "4.pt").write_bytes(torch_file(some_map(4)))
    np.testing.assert_array_equal(maps.read("a/4"), some_map(4))


def test_every_number_of_a_class_is_exact(tmp_path):
    """float16 holds whole numbers up to 2048."""
    (tmp_path / "a").mkdir()
    found = np.zeros((2, 5, 1, 1), np.float32)
    found[1, :, 0, 0] = 2047, 2049, 2051, 4099, 9999
    np.save(tmp_path / "a" / "1.npy", found)
    np.testing.assert_array_equal(
        label_maps.LabelMaps(str(tmp_path), 10_000, "a/1").read("a/1"), found
    )
    found[1], found[0, 0] = 0, 70_000
    np.save(tmp_path / "a" / "1.npy", found)
    with pytest.raises(ValueError, match="finite"):
        label_maps.LabelMaps(str(tmp_path), 2049, "a/1")


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"file_name": b"n01440764_10026.JPEG"}, "n01440764/n01440764_10026"),
        ({"file_name": "n02_1.png"}, "n02/n02_1"),
    ],
)
def test_names_of_records(record, name):
    assert label_maps.name_of(record) == name
    with pytest.raises(ValueError, match=r"data\.label_maps"):
        label_maps.name_of({"id": 3})


# ---------------------------------------------------------------------------- on the device


def brute_force(found, box, grid, classes):
    """RoIAlign by loops, two times two samples for each token."""
    logits, chosen = np.asarray(found, np.float64)
    weights = np.exp(logits) / np.exp(logits).sum(0)
    k, h, w = weights.shape
    dense = np.zeros((h, w, classes))
    for i in range(k):
        for y in range(h):
            for x in range(w):
                dense[y, x, int(chosen[i, y, x])] += weights[i, y, x]
    top, left, height, width, flipped = box
    out = np.zeros((*grid, classes))
    for i in range(grid[0]):
        for j in range(grid[1]):
            for sy in (0.25, 0.75):
                for sx in (0.25, 0.75):
                    y = np.clip((top + height * (i + sy) / grid[0]) * h - 0.5, 0, h - 1)
                    x = np.clip((left + width * (j + sx) / grid[1]) * w - 0.5, 0, w - 1)
                    y0, x0 = int(y), int(x)
                    y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
                    fy, fx = y - y0, x - x0
                    out[i, j] += (
                        (1 - fy) * (1 - fx) * dense[y0, x0]
                        + (1 - fy) * fx * dense[y0, x1]
                        + fy * (1 - fx) * dense[y1, x0]
                        + fy * fx * dense[y1, x1]
                    ) / 4
    return out[:, ::-1] if flipped else out


@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (14, 14)])
def test_targets_of_tokens_are_roi_align(grid):
    boxes = [(0, 0, 1, 1, 0), (0.1, 0.3, 0.5, 0.4, 0), (0.55, 0.0, 0.45, 0.9, 1)]
    maps = np.stack([some_map(seed) for seed in range(3)])
    found = device_ops.token_targets(
        jnp.asarray(maps), jnp.asarray(boxes, jnp.float32), grid, CLASSES
    )
    expected = [brute_force(m, box, grid, CLASSES) for m, box in zip(maps, boxes, strict=True)]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)


# ---------------------------------------------------------------------------- batches


def photos(root):
    """Pictures whose left half is dark and whose right half is light; maps say so as well."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        for folder in (root / "train" / name, root / "maps" / name):
            folder.mkdir(parents=True)
        for i in range(4):
            image = np.full((60, 80, 3), 40, np.uint8)
            image[:, 40:] = 210
            assert cv2.imwrite(str(root / "train" / name / f"{i}.png"), image)
            logits = np.full((1, 8, 8), 3.0)
            classes = np.zeros((1, 8, 8))
            classes[:, :, 4:] = 1
            found = np.stack([logits, classes]).astype(np.float16)
            found[0] += np.float16(rng.normal())
            if i % 2:
                np.save(root / "maps" / name / f"{i}.npy", found)
            else:
                (root / "maps" / name / f"{i}.pt").write_bytes(torch_file(found))
    return {"name": "folder", "dir": str(root), "label_maps": str(root / "maps")}


def options_of(root, **fields):
    given = {"image_size": (32, 32), "crop": "resized", "area": (0.3, 1.0), "flip": True}
    return schema.Images(**{**photos(root), **given, **fields})


def batches(source, n=2, **how):
    return list(loader.train_batches(source, batch_size=8, seed=3, start=0, stop=n, **how))


def test_maps_follow_the_crop_and_the_flip_of_their_images(tmp_path):
    source = pipeline.open_split(options_of(tmp_path), "train", train=True)
    flips, seen = set(), 0
    for batch in batches(source, 4):
        assert batch["label_map"].shape == (8, 2, 1, 8, 8)
        target = device_ops.token_targets(batch["label_map"], batch["label_box"], (8, 8), 2)
        light = np.asarray(target)[..., 1]
        tokens = batch["image"].reshape(8, 8, 4, 8, 4, 3).mean((2, 4, 5))  # [b, 8, 8]
        sure = (light < 0.01) | (light > 0.99)
        np.testing.assert_array_equal((tokens > 125)[sure], (light > 0.5)[sure])
        seen += (light.min((1, 2)) < 0.01).sum() + (light.max((1, 2)) > 0.99).sum()
        flips |= set(batch["label_box"][:, 4].tolist())
    assert flips == {0.0, 1.0} and seen > 32


def test_batches_do_not_depend_on_hosts_or_workers(tmp_path):
    source = pipeline.open_split(options_of(tmp_path), "train", train=True)
    whole = batches(source)
    for how in ({"shard": (1, 2)}, {"workers": 1}):
        for batch, one in zip(batches(source, **how), whole, strict=True):
            for key in batch:
                part = one[key][4:] if "shard" in how else one[key]
                np.testing.assert_array_equal(batch[key], part, err_msg=key)
    plain = pipeline.open_split(options_of(tmp_path / "b", label_maps=None), "train", train=True)
    np.testing.assert_array_equal(batches(plain)[0]["image"], whole[0]["image"])
    assert "label_map" not in batches(plain)[0]


def test_a_map_is_where_its_picture_is_and_has_its_whole_name(tmp_path):
    options = options_of(tmp_path)
    for folder, ending in (("train", "png"), ("maps", "npy")):
        place = tmp_path / folder / "dog"
        (place / "day1").mkdir()
        for old, new in (("1", "day1/2"), ("3", "2.b")):  # beside dog/2 itself
            (place / f"{old}.{ending}").rename(place / f"{new}.{ending}")
    source = pipeline.open_split(options, "train", train=True)
    assert all(batch["mask"].all() for batch in batches(source))
    shutil.copy(tmp_path / "train" / "cat" / "1.png", tmp_path / "train" / "cat" / "1.jpg")
    with pytest.raises(ValueError, match=r"cat/1\.jpg and .*cat/1\.png .* cat/1: rename"):
        pipeline.open_split(options, "train", train=True)


def test_a_missing_map_is_a_bad_record(tmp_path):
    options = options_of(tmp_path, max_bad_records=1)
    (tmp_path / "maps" / "dog" / "3.npy").unlink()
    source = pipeline.open_split(options, "train", train=True)
    masks = np.concatenate([batch["mask"] for batch in batches(source, 1)])
    assert len(source.bad) == 1 and masks.sum() == 7
    strict = options.model_copy(update={"max_bad_records": 0})
    with pytest.raises(ValueError, match="dog/3"):
        batches(pipeline.open_split(strict, "train", train=True))
    (tmp_path / "maps" / "cat" / "0.pt").unlink()
    with pytest.raises(ValueError, match=r"data\.label_maps=.*cat/0"):
        pipeline.open_split(strict, "train", train=True)
    several = options.model_copy(update={"max_bad_records": 2})  # the shape is that of the next map
    source = pipeline.open_split(several, "train", train=True)
    masks = np.concatenate([batch["mask"] for batch in batches(source, 1)])
    assert len(source.bad) == 2 and masks.sum() == 6
    pipeline.open_split(options, "train", train=False)  # evaluation needs none


@pytest.mark.parametrize(
    "fields", [{"crop": "pad", "pad": 1}, {"crop": "none"}, {"in_memory": True}]
)
def test_maps_need_crops_of_the_original(fields, tmp_path):
    with pytest.raises(ValueError, match=r"data\.label_maps"):
        pipeline.open_split(options_of(tmp_path, **fields), "train", train=True)


@pytest.mark.parametrize(
    ("model", "task"),
    [
        ({"name": "coatnet_0"}, {}),
        ({"name": "volo_d1", "aux_head": False}, {}),
        ({"name": "volo_d1"}, {"mixup": 0.8}),
        ({"name": "volo_d1"}, {"cutmix": 1.0}),
    ],
)
def test_maps_need_a_model_that_classifies_tokens_of_one_image(model, task, tmp_path):
    data = options_of(tmp_path).model_dump()
    run = validation.check({"model": model, "task": task, "data": data})
    with pytest.raises(ValueError, match=r"data\.label_maps"):
        create_task(run)


# ---------------------------------------------------------------------------- the loss


class Tokens(nn.Module):
    """Logits of the class and of a 2x2 grid of tokens, from the pixels."""

    classes: int = 2

    @nn.compact
    def __call__(self, x, *, train=False):
        y = nn.Dense(2, name="dense")(x.mean((1, 2)))
        grid = x.reshape(len(x), 2, x.shape[1] // 2, 2, x.shape[2] // 2, -1).mean((2, 4))
        aux = nn.Dense(2, name="aux")(grid)
        return y, {"aux_logits": aux, "mix_box": jnp.array([0, 0, 1, 1])}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_tokens_is_that_of_the_maps(smoothing, tmp_path):
    data = options_of(tmp_path)
    run = validation.check(
        {
            "model": {"name": "m"},
            "task": {"label_smoothing": smoothing, "token_weight": 0.5},
            "data": data.model_dump(),
        }
    )
    source = pipeline.open_split(data, "train", train=True)
    batch = {k: jnp.asarray(v) for k, v in batches(source, 1)[0].items()}
    model = Tokens()
    variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    found = classification.loss(model, run, variables, batch, jax.random.key(1))

    logits, out = model.apply(variables, device_ops.normalize(batch["image"], data))
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    aux = np.asarray(jax.nn.log_softmax(out["aux_logits"]), np.float64)
    label = np.eye(2)[np.asarray(batch["label"])]
    tokens = np.stack(
        [
            brute_force(m, box, (2, 2), 2)
            for m, box in zip(batch["label_map"], batch["label_box"], strict=True)
        ]
    )
    smooth = lambda t: (1 - smoothing) * t + smoothing / 2  # noqa: E731
    mixed = 0.75 * label + 0.25 * label[::-1]  # the class logits are of mixed tokens
    expected = (
        -(smooth(mixed) * log_p).sum() - 0.5 * (smooth(tokens) * aux).sum(-1).mean((1, 2)).sum()
    )
    np.testing.assert_allclose(found.total, expected, rtol=1e-4)
