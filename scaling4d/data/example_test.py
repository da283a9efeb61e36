import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling4d.data.example import decode_example, encode_example

FIELDS = st.dictionaries(
    st.text(max_size=8),
    st.one_of(st.binary(max_size=50), st.integers(-(2**63), 2**63 - 1), st.floats(width=32, allow_nan=False)),
)


@given(FIELDS)
def test_decoding_gives_back_what_was_encoded(fields):
    assert decode_example(encode_example(fields)) == fields


@given(FIELDS)
def test_the_order_of_fields_does_not_matter(fields):
    backwards = dict(reversed(fields.items()))
    assert encode_example(backwards) == encode_example(fields)


def test_tensorflow_reads_our_bytes_and_we_read_its():
    import tensorflow as tf

    fields = {"video": b"\x00\x01\xff", "frames": 64, "start_us": -5, "fps": 29.97}
    data = encode_example(fields)
    features = {
        "video": tf.io.FixedLenFeature([], tf.string),
        "frames": tf.io.FixedLenFeature([], tf.int64),
        "start_us": tf.io.FixedLenFeature([], tf.int64),
        "fps": tf.io.FixedLenFeature([], tf.float32),
    }
    parsed = tf.io.parse_single_example(data, features)
    assert parsed["video"].numpy() == fields["video"] and int(parsed["frames"]) == 64
    assert int(parsed["start_us"]) == -5 and float(parsed["fps"]) == np.float32(29.97)

    theirs = tf.train.Example()
    theirs.ParseFromString(data)
    assert theirs.features.feature["frames"].int64_list.value[:] == [64]
    assert math.isclose(decode_example(theirs.SerializeToString())["fps"], 29.97, rel_tol=1e-6)


def test_lists_of_other_lengths_are_left_out():
    import tensorflow as tf

    example = tf.train.Example()
    example.features.feature["many"].int64_list.value.extend([1, 2])
    example.features.feature["none"].bytes_list.SetInParent()
    example.features.feature["one"].bytes_list.value.append(b"x")
    assert decode_example(example.SerializeToString()) == {"one": b"x"}


def test_other_bytes_and_other_types_are_refused():
    with pytest.raises(ValueError, match="not a tf.train.Example"):
        decode_example(b"\xff\xff\xff")
    with pytest.raises(TypeError, match="'text'"):
        encode_example({"text": "str is not bytes"})
