# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localglobal_jax.data.tfds.tfrecord import masked_crc, read_tfrecord

RECORDS = st.lists(st.binary(max_size=200), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("tfrecord") / "file"


def frame(record):
    length = len(record).to_bytes(8, "little")
    return b"".join(p + masked_crc(p).to_bytes(4, "little") for p in (length, record))


def test_checksum_is_the_one_every_tensorflow_event_file_begins_with():
    assert masked_crc((24).to_bytes(8, "little")) == int.from_bytes(b'\xa3\x7fK"', "little")


@settings(deadline=None, max_examples=30)
@given(RECORDS)
def test_reads_what_an_independent_writer_wrote(path, written):
    from tensorboardX.record_writer import RecordWriter

    path.unlink(missing_ok=True)
    writer = RecordWriter(str(path))
    for record in written:
        writer.write(record)
    writer.close()
    assert list(read_tfrecord(path)) == written


@settings(deadline=None, max_examples=100)
@given(RECORDS, st.data())
def test_any_flipped_bit_is_noticed_and_what_came_before_is_right(path, written, data):
    whole = b"".join(map(frame, written))
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    found = []
    with pytest.raises(ValueError, match=rf"{path}: record \d"):
        for record in read_tfrecord(path):
            found.append(record)
    assert found == written[: len(found)]


@settings(deadline=None, max_examples=60)
@given(RECORDS, st.data())
def test_a_cut_is_noticed_unless_it_is_between_records(path, written, data):
    frames = [frame(record) for record in written]
    ends = [sum(map(len, frames[:i])) for i in range(len(frames) + 1)]
    cut = data.draw(st.integers(0, ends[-1]))
    path.write_bytes(b"".join(frames)[:cut])
    if cut in ends:
        assert list(read_tfrecord(path)) == written[: ends.index(cut)]
    else:
        with pytest.raises(ValueError, match="cut off"):
            list(read_tfrecord(path))
