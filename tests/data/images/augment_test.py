# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from localglobal_jax.data.images import augment
from localglobal_jax.data.images.randaugment import OPERATIONS, randaugment

SOME = settings(deadline=None, max_examples=40)
SIDE = st.integers(1, 20)
IMAGE = st.tuples(SIDE, SIDE, st.sampled_from([1, 3])).flatmap(lambda s: hnp.arrays(np.uint8, s))
SIZE = st.tuples(SIDE, SIDE)
SEED = st.integers(0, 2**32)


def ramp(h=16, w=20, c=3):
    return np.arange(h * w * c, dtype=np.uint32).astype(np.uint8).reshape(h, w, c)


@SOME
@given(
    images=st.tuples(st.integers(1, 4), SIDE, SIDE, st.sampled_from([1, 3])).flatmap(
        lambda shape: hnp.arrays(np.uint8, shape)
    ),
    pad=st.integers(0, 4),
    seed=SEED,
)
def test_pad_crop_is_a_window_of_the_padded_image(images, pad, seed):
    uniform = np.random.default_rng(seed).random((len(images), 2))
    out = augment.pad_crop(images, pad, uniform)
    assert out.shape == images.shape and out.dtype == np.uint8
    _, h, w, _ = images.shape
    for image, cut, (y, x) in zip(images, out, uniform, strict=True):
        padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
        top, left = int(y * (2 * pad + 1)), int(x * (2 * pad + 1))
        np.testing.assert_array_equal(cut, padded[top : top + h, left : left + w])


def test_pad_crop_reaches_every_offset():
    image = np.ones((1, 4, 4, 1), np.uint8)
    ends = np.array([[0.0, 0.0], [1 - 2**-53, 1 - 2**-53]])
    first, last = augment.pad_crop(np.repeat(image, 2, 0), 2, ends)[..., 0]
    assert first[2:, 2:].all() and first.sum() == 4
    assert last[:2, :2].all() and last.sum() == 4


def test_flip_mirrors_the_chosen_and_leaves_its_input_alone():
    images = ramp()[None].repeat(2, 0)
    before = images.copy()
    out = augment.flip(images, np.array([0.4, 0.6]))
    np.testing.assert_array_equal(out[0], before[0, :, ::-1])
    np.testing.assert_array_equal(out[1], before[1])
    np.testing.assert_array_equal(images, before)


@SOME
@given(image=IMAGE, size=SIZE, seed=SEED)
def test_crops_give_the_size_asked_for(image, size, seed):
    def generator():
        return np.random.default_rng(seed)

    for out in (
        augment.resize(image, size),
        augment.center_crop(image, size, 0.875),
        augment.resize_crop(image, size),
    ):
        assert out.shape == (*size, image.shape[2]) and out.dtype == np.uint8
    shape = image.shape[:2]
    first, again = (augment.random_box(shape, size, (0.08, 1.0), generator()) for _ in "ab")
    assert first == again
    top, left, height, width = first
    assert 0 <= top < top + height <= shape[0] and 0 <= left < left + width <= shape[1]


@SOME
@given(
    image=st.tuples(st.integers(1, 90), st.integers(1, 90), st.sampled_from([1, 3])).flatmap(
        lambda shape: hnp.arrays(np.uint8, shape)
    ),
    size=SIZE,
)
def test_crops_are_resized_as_whole_images_are_within_one_level(image, size):
    difference = augment.resize_crop(image, size).astype(int) - augment.resize(image, size)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("turned", [False, True])
def test_the_side_that_shrinks_is_averaged_where_the_other_grows(turned, channels):
    stripes = np.arange(1, 161, dtype=np.uint8) // 2 % 2 * 200  # two columns of 200, two of 0
    image = np.tile(stripes[None, :, None], (6, 1, channels))
    image = np.ascontiguousarray(image.swapaxes(0, 1)) if turned else image
    for resize in (augment.resize, augment.resize_crop):
        assert (resize(image, (8, 8)) == 100).all()


@SOME
@given(value=st.integers(0, 255), size=SIZE, seed=SEED)
def test_a_plain_image_stays_plain(value, size, seed):
    image = np.full((13, 17, 3), value, np.uint8)
    rng = np.random.default_rng(seed)
    for out in (
        augment.resize(image, size),
        augment.resize_crop(image, size),
        augment.resize_crop(image[: rng.integers(1, 14)], size),
    ):
        assert (out == value).all()


def test_center_crop_keeps_the_aspect_and_the_middle():
    image = np.zeros((40, 80, 1), np.uint8)
    image[:, 20:60] = 200  # the middle square
    np.testing.assert_array_equal(augment.center_crop(image, (40, 40), 1.0), image[:, 20:60])
    inner = augment.center_crop(image, (35, 35), 0.875)
    np.testing.assert_array_equal(inner, np.full((35, 35, 1), 200))
    wide = augment.center_crop(image, (20, 80), 1.0)  # twice as wide as the image's aspect
    np.testing.assert_array_equal(wide, image[10:30])


@pytest.mark.parametrize("c", [1, 3])
def test_erasing_changes_one_rectangle_of_the_right_area(c):
    image = np.zeros((64, 64, c), np.uint8)
    shares = []
    for seed in range(40):
        out = augment.random_erase(image, 1.0, np.random.default_rng(seed))
        rows, columns = np.nonzero(out.any(axis=2))
        box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        shares.append(box / 64**2)
    assert 0.01 < min(shares) < 0.1 and 0.3 < max(shares) < 0.45
    assert not image.any()
    never = augment.random_erase(image, 0.0, np.random.default_rng(0))
    assert never is image


@pytest.mark.parametrize("name", OPERATIONS)
@SOME
@given(image=IMAGE, strength=st.floats(0, 3), sign=st.sampled_from([-1, 1]))
def test_operations_keep_shape_and_type_and_their_input(name, image, strength, sign):
    before = image.copy()
    out = OPERATIONS[name](image, strength, sign)
    assert out.shape == image.shape and out.dtype == np.uint8
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"autocontrast", "equalize"}))
def test_no_strength_is_no_change(name):
    image = ramp()
    np.testing.assert_array_equal(OPERATIONS[name](image, 0.0, 1), image)


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"identity"}))
def test_strength_changes_the_image(name):
    image = ramp() // 2 + 40
    assert (OPERATIONS[name](image, 1.0, 1) != image).any()


def test_operations_do_what_their_names_say():
    image = np.zeros((20, 20, 1), np.uint8)
    image[:, 10:] = 100

    def run(name, strength=1.0, sign=1):
        return OPERATIONS[name](image, strength, sign)[..., 0]

    np.testing.assert_array_equal(run("translate_x")[:, 19], np.full(20, 100))
    np.testing.assert_array_equal(run("translate_x")[:, :9], np.full((20, 9), 128))  # the fill
    np.testing.assert_array_equal(run("translate_y")[10], image[0, :, 0])
    assert set(np.unique(run("autocontrast"))) == {0, 255}
    np.testing.assert_array_equal(run("solarize"), 255 - image[..., 0])
    np.testing.assert_array_equal(run("solarize", 0.9), np.where(image[..., 0] < 26, 0, 155))
    np.testing.assert_array_equal(run("posterize"), image[..., 0] // 16 * 16)
    np.testing.assert_array_equal(np.unique(run("brightness")), [0, 190])
    np.testing.assert_array_equal(np.unique(run("contrast", 0.5, -1)), [22, 78])
    turned = OPERATIONS["rotate"](image, 3.0, 1)[..., 0]  # 90 degrees counter-clockwise
    np.testing.assert_array_equal(turned[:9], np.full((9, 20), 100))
    assert turned[11:].max() == 0


@SOME
@given(image=IMAGE, layers=st.integers(0, 4), magnitude=st.integers(0, 30), seed=SEED)
def test_randaugment_is_a_function_of_its_generator(image, layers, magnitude, seed):
    first, again = (
        randaugment(image, layers, magnitude, np.random.default_rng(seed)) for _ in range(2)
    )
    assert first.shape == image.shape and first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)


def test_randaugment_uses_all_fourteen_operations(monkeypatch):
    used = []
    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, lambda x, s, g, name=name: used.append(name) or x)
    randaugment(ramp(), 300, 15, np.random.default_rng(0))
    assert set(used) == set(OPERATIONS) and len(OPERATIONS) == 14
