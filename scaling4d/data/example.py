"""``tf.train.Example`` without TensorFlow, and reading ``tf.train.SequenceExample``.

Responsible for: turning a flat dictionary of bytes, integers and floats into the protobuf bytes that TensorFlow's
parser reads, and back. Not responsible for: which fields a clip record has (``records.py``, ``jpeg_clips.py``).

The message types are built at run time in a private descriptor pool, so that importing TensorFlow later in the same
process (which registers types of the same names in the default pool) does not collide.
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

Value = bytes | int | float

_FIELD = descriptor_pb2.FieldDescriptorProto


def _build_types() -> tuple[type[message.Message], ...]:
    """Example and SequenceExample, with the field numbers of tensorflow/core/example/{feature,example}.proto."""
    file = descriptor_pb2.FileDescriptorProto(name="scaling4d/example.proto", package="scaling4d", syntax="proto3")

    def add(name: str, *fields: tuple[str, int, int, int, str | None]) -> descriptor_pb2.DescriptorProto:
        proto = file.message_type.add(name=name)
        for field_name, number, kind, label, type_name in fields:
            field = proto.field.add(name=field_name, number=number, type=kind, label=label)
            if type_name:
                field.type_name = f".scaling4d.{type_name}"
        return proto

    one, many, sub = _FIELD.LABEL_OPTIONAL, _FIELD.LABEL_REPEATED, _FIELD.TYPE_MESSAGE
    add("BytesList", ("value", 1, _FIELD.TYPE_BYTES, many, None))
    add("FloatList", ("value", 1, _FIELD.TYPE_FLOAT, many, None))
    add("Int64List", ("value", 1, _FIELD.TYPE_INT64, many, None))
    feature = add(
        "Feature",
        ("bytes_list", 1, sub, one, "BytesList"),
        ("float_list", 2, sub, one, "FloatList"),
        ("int64_list", 3, sub, one, "Int64List"),
    )
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    features = add("Features", ("feature", 1, sub, many, "Features.FeatureEntry"))
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=_FIELD.TYPE_STRING, label=one)
    entry.field.add(name="value", number=2, type=sub, label=one, type_name=".scaling4d.Feature")
    add("Example", ("features", 1, sub, one, "Features"))

    add("FeatureList", ("feature", 1, sub, many, "Feature"))
    lists = add("FeatureLists", ("feature_list", 1, sub, many, "FeatureLists.FeatureListEntry"))
    entry = lists.nested_type.add(name="FeatureListEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=_FIELD.TYPE_STRING, label=one)
    entry.field.add(name="value", number=2, type=sub, label=one, type_name=".scaling4d.FeatureList")
    add("SequenceExample", ("context", 1, sub, one, "Features"), ("feature_lists", 2, sub, one, "FeatureLists"))

    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    names = ("scaling4d.Example", "scaling4d.SequenceExample")
    return tuple(message_factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in names)


_types: Any = _build_types()
_Example, _SequenceExample = _types


def encode_example(fields: dict[str, Value]) -> bytes:
    """The serialized Example that holds each field as a list of one value; the same fields give the same bytes.

    bytes become a bytes_list, integers an int64_list, floats a float_list (32-bit).
    """
    example = _Example()
    for name, value in fields.items():
        feature = example.features.feature[name]
        if isinstance(value, bytes):
            feature.bytes_list.value.append(value)
        elif isinstance(value, int):
            feature.int64_list.value.append(value)
        elif isinstance(value, float):
            feature.float_list.value.append(value)
        else:
            raise TypeError(f"field {name!r}: {type(value).__name__} is not bytes, int or float")
    return example.SerializeToString(deterministic=True)


def decode_example(data: bytes) -> dict[str, Value]:
    """The fields of a serialized Example; a list of one value is that value, other lengths are left out.

    Raises ValueError when the bytes are not an Example.
    """
    example = _Example()
    try:
        example.ParseFromString(data)
    except message.DecodeError as error:
        raise ValueError(f"not a tf.train.Example: {error}") from error
    return _single_values(example.features)


def decode_sequence_example(data: bytes, frames: str) -> tuple[dict[str, Value], list[bytes]]:
    """The context's fields (as ``decode_example`` gives them) and the bytes of the feature list ``frames``.

    The list is empty where there is none; a frame that is not one value of bytes is empty. Raises ValueError when the
    bytes are not a SequenceExample.
    """
    example = _SequenceExample()
    try:
        example.ParseFromString(data)
    except message.DecodeError as error:
        raise ValueError(f"not a tf.train.SequenceExample: {error}") from error
    lists = example.feature_lists.feature_list
    found = lists[frames].feature if frames in lists else ()
    values = [feature.bytes_list.value for feature in found]
    return _single_values(example.context), [value[0] if len(value) == 1 else b"" for value in values]


def _single_values(features: Any) -> dict[str, Value]:
    fields: dict[str, Value] = {}
    for name, feature in features.feature.items():
        kind = feature.WhichOneof("kind")
        values = getattr(feature, kind).value if kind else ()
        if len(values) == 1:
            fields[name] = values[0]
    return fields
