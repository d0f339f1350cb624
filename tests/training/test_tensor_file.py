"""The oracle is the safetensors library: it reads what is written here, and takes all that is taken here."""

import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsegate.training.storage import read_file
from sparsegate.training.tensor_file import DTYPES, encode_tensors, read_tensors
from tests.helpers.checkpoints import bits, same_bits

LIBRARY_CANNOT_READ = {torch.float8_e8m0fnu}  # its `load`; its `save` can write it

keys = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1).filter(
    lambda k: k != "__metadata__"
)
shapes = st.lists(st.integers(0, 4), max_size=4)


@st.composite
def tensors(draw) -> Tensor:
    dtype, shape = draw(st.sampled_from(list(DTYPES.values()))), draw(shapes)
    numel = math.prod(shape)
    data = draw(st.binary(min_size=numel * dtype.itemsize, max_size=numel * dtype.itemsize))
    raw = torch.tensor(list(data), dtype=torch.uint8)
    tensor = (raw % 2).bool() if dtype is torch.bool else raw.view(dtype)
    tensor = tensor.reshape(shape)
    return tensor.transpose(0, -1) if len(shape) > 1 and draw(st.booleans()) else tensor


def encode(group: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    encoded = encode_tensors(group, name="model", metadata=metadata)
    data = b"".join(encoded.chunks())
    assert len(data) == encoded.size
    return data


class Bytes:
    """A reader of bytes in memory."""

    def __init__(self, data: bytes) -> None:
        self.size, self._rest = len(data), memoryview(data)

    def read(self, count: int) -> bytearray:
        data = bytearray(count)
        self.read_into(memoryview(data))
        return data

    def read_into(self, buffer: memoryview) -> None:
        if len(buffer) > len(self._rest):
            raise ValueError("the file ends too early")
        buffer[:] = self._rest[: len(buffer)]
        self._rest = self._rest[len(buffer) :]


@given(st.dictionaries(keys, tensors(), max_size=5), st.dictionaries(st.text(), st.text(), max_size=2))
def test_tensors_come_back_with_order_dtype_shape_and_bits(group, metadata) -> None:
    found, found_metadata = read_tensors(Bytes(encode(group, metadata)))
    assert list(found) == list(group)
    assert found_metadata == metadata
    for key in group:
        assert same_bits(found[key], group[key])
        assert found[key].untyped_storage().nbytes() == group[key].nbytes


@given(st.dictionaries(keys, tensors(), max_size=5))
def test_every_tensor_begins_at_a_multiple_of_its_item_size(group) -> None:
    data = encode(group)
    length = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:length])
    for key, tensor in group.items():
        assert (length + header[key]["data_offsets"][0]) % tensor.element_size() == 0


@given(st.dictionaries(keys, tensors(), max_size=5))
def test_the_library_reads_what_is_written(group) -> None:
    group = {key: tensor for key, tensor in group.items() if tensor.dtype not in LIBRARY_CANNOT_READ}
    found = safetensors.torch.load(encode(group))
    assert set(found) == set(group)
    for key in group:
        assert same_bits(found[key], group[key])


@given(st.dictionaries(keys, tensors(), max_size=5))
def test_what_the_library_writes_is_read(group) -> None:
    group = {key: tensor.contiguous().clone() for key, tensor in group.items()}
    found, _ = read_tensors(Bytes(safetensors.torch.save(group)))
    assert set(found) == set(group)
    for key in group:
        assert same_bits(found[key], group[key])


def test_tensors_are_read_into_what_they_are_given_and_copied_only_where_it_lies_otherwise() -> None:
    group = {"same": torch.randn(3, 4), "wide": torch.randn(5).bfloat16(), "turned": torch.randn(2, 6)}
    group["own"] = torch.arange(4)
    given = {"same": torch.zeros(3, 4), "wide": torch.zeros(5), "turned": torch.zeros(6, 2).T}
    told = {}

    def targets(found):
        told.update(found)
        return given

    found, _ = read_tensors(Bytes(encode(group)), targets)
    assert {name: (t.device.type, t.dtype, t.shape) for name, t in told.items()} == {
        name: ("meta", t.dtype, t.shape) for name, t in group.items()
    }
    for name, tensor in group.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype))
        assert name == "own" or found[name] is given[name]


def test_a_file_that_does_not_suit_its_reader_is_refused_before_any_of_it_is_read() -> None:
    def targets(found):
        raise ValueError("not these")

    reader = Bytes(encode({"w": torch.ones(3)}))
    with pytest.raises(ValueError, match="^not these$"):
        read_tensors(reader, targets)
    assert len(reader._rest) == 12


def test_views_parameters_and_tied_tensors_are_written_as_their_values(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    group = {
        "parameter": torch.nn.Parameter(base),
        "tied": base,
        "expanded": base[:1].expand(5, 4),
        "strided": base[::2, 1::2],
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "negative": torch.tensor([1 + 2j]).conj().imag,
    }
    path = tmp_path / "model.safetensors"
    path.write_bytes(encode(group))
    found, _ = read_file(path, read_tensors)
    for key, tensor in group.items():
        assert bits(found[key]) == bits(tensor.detach().clone().resolve_conj().resolve_neg())


@pytest.mark.parametrize(
    ("tensor", "cause"),
    [
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.empty(2, device="meta"), "meta"),
        (torch.zeros(2, dtype=torch.complex128), "complex128"),
        ([1.0], "list"),
        (1.0, "float"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_by_its_name(tensor, cause) -> None:
    with pytest.raises(ValueError, match=f"^model: tensor 'w_in' is [^\n]*{cause}[^\n]*$"):
        encode_tensors({"w_in": tensor}, name="model")


@pytest.mark.parametrize("key", ["two\nlines", "\ud800", "__metadata__", 1])
def test_names_that_the_format_cannot_hold_are_refused(key) -> None:
    with pytest.raises(ValueError, match="^model: tensor [^\n]* needs a name"):
        encode_tensors({key: torch.zeros(1)}, name="model")


def file_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4), **more: object) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


BROKEN = {
    "nothing": b"",
    "seven bytes": bytes(7),
    "no header": bytes(8),
    "header beyond the end": (100).to_bytes(8, "little") + b"{}",
    "header of 2**63": (2**63).to_bytes(8, "little") + b"{}",
    "not JSON": file_of(b"pickle"),
    "a list": file_of([1]),
    "an entry twice": file_of(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(4)),
    "truncated": file_of({"a": entry()}, bytes(3)),
    "padded": file_of({"a": entry()}, bytes(5)),
    "a hole": file_of({"a": entry(), "b": entry(offsets=(8, 12))}, bytes(12)),
    "overlap": file_of({"a": entry(), "b": entry()}, bytes(4)),
    "negative offsets": file_of({"a": entry(offsets=(-4, 0))}),
    "reversed offsets": file_of({"a": entry(offsets=(4, 0))}, bytes(4)),
    "huge offsets": file_of({"a": entry(shape=(2**61,), offsets=(0, 2**63))}),
    "three offsets": file_of({"a": entry(offsets=(0, 4, 4))}, bytes(4)),
    "offsets of text": file_of({"a": entry(offsets=("0", "4"))}, bytes(4)),
    "offsets of fractions": file_of({"a": entry(offsets=(0.0, 4.0))}, bytes(4)),
    "shape of truth": file_of({"a": entry(shape=(True,))}, bytes(4)),
    "negative shape": file_of({"a": entry(shape=(-1, -1))}, bytes(4)),
    "shape of lists": file_of({"a": entry(shape=([1],))}, bytes(4)),
    "shape of nothing": file_of({"a": entry(shape=None)}, bytes(4)),
    "empty but vast": file_of({"a": entry(shape=(2**62, 2**62, 0), offsets=(0, 0))}),
    "empty and beyond 64 bits": file_of({"a": entry(shape=(2**70, 0), offsets=(0, 0))}),
    "too large for its bytes": file_of({"a": entry(shape=(2,))}, bytes(4)),
    "dtype object": file_of({"a": entry(dtype="O")}, bytes(4)),
    "dtype list": file_of({"a": entry(dtype=["F32"])}, bytes(4)),
    "dtype missing": file_of({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "an entry too many": file_of({"a": entry(__reduce__="os.system")}, bytes(4)),
    "an entry of text": file_of({"a": "F32"}),
    "unprintable name": file_of({"a\nb": entry()}, bytes(4)),
    "truth of 2": file_of({"a": entry(dtype="BOOL", offsets=(0, 1))}, b"\x02"),
    "metadata of numbers": file_of({"__metadata__": {"a": 1}}),
    "metadata of a list": file_of({"__metadata__": []}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_in_one_line(name) -> None:
    with pytest.raises(ValueError, match="^[^\n]+$"):
        read_tensors(Bytes(BROKEN[name]))


@given(
    st.dictionaries(keys, tensors(), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_whatever_is_taken_the_library_takes_as_the_same(group, changes) -> None:
    data = bytearray(encode(group))
    for position, value in changes:
        data[position % min(len(data), 200)] = value
    try:
        found, _ = read_tensors(Bytes(bytes(data)))
    except ValueError:
        return
    if any(tensor.dtype in LIBRARY_CANNOT_READ for tensor in found.values()):
        return
    expected = safetensors.torch.load(bytes(data))
    assert set(found) == set(expected)
    for key in expected:
        assert same_bits(found[key], expected[key])
