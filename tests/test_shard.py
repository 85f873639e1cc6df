"""The shard writer: files against zarr-python, tensorstore and a map of the file; failures of the disk."""

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import tensorstore
import zarr

from looptap.benchmarks.bare_plan import bare_plan
from looptap.capture.store.layout import BFLOAT16_NAN, ArraySpec, create_store
from looptap.capture.store.places import file_sink
from looptap.capture.store.places.aligned import PAGE_BYTES, page_aligned
from looptap.capture.store.places.file_sink import FileSink
from looptap.capture.store.writing import shard
from looptap.capture.store.writing.encode import encode, file_shape, write_array
from looptap.capture.store.writing.ring import Ring
from looptap.capture.store.writing.shard import ShardWriter

DEPTHS = 3
BFLOAT16 = {"bits_of": "bfloat16"}


def make_array(root: Path, spec: ArraySpec) -> dict:
    """Metadata of one array of a store made for it."""
    create_store(root, plan=bare_plan(spec.shape[0] // spec.unit_rows), coordinates={}, arrays={"x": spec})
    return json.loads((root / "x" / "zarr.json").read_bytes())


def state_spec(unit_rows, shard_rows, hidden, dtype="float32", codec="none", num_units=2) -> ArraySpec:
    axes, shape = ("token", "depth_state", "hidden"), (num_units * unit_rows, DEPTHS, hidden)
    attributes = BFLOAT16 if dtype == "uint16" else {}
    return ArraySpec(axes, shape, unit_rows, dtype, attributes, codec, shard_rows)


def open_sinks(root: Path, metadata: dict, unit: int, num_units: int = 2) -> list[FileSink]:
    """Files under their final names, without the protocol in between."""
    num_shards = metadata["shape"][0] // num_units // file_shape(metadata)[0]
    rest = ".0" * (len(metadata["shape"]) - 1)
    return [FileSink(root / "x" / f"c.{unit * num_shards + i}{rest}") for i in range(num_shards)]


def noise(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "uint16" else values.astype(dtype)


def whole(spec: ArraySpec, rows: np.ndarray, unit: int) -> np.ndarray:
    """The array with one unit written, by numpy alone."""
    fill = BFLOAT16_NAN if spec.dtype == "uint16" else np.nan
    values = np.full(spec.shape, fill, spec.dtype)
    values[unit * spec.unit_rows : unit * spec.unit_rows + len(rows)] = rows
    return values


def assert_reads(root: Path, expected: np.ndarray) -> None:
    """Both libraries read these values; bits are compared, since NaN is not NaN."""
    bits = f"u{expected.dtype.itemsize}"
    found = zarr.open_array(str(root), path="x", mode="r")[...]
    np.testing.assert_array_equal(np.asarray(found).view(bits), expected.view(bits))
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(root / "x")}}
    found = tensorstore.open(spec, read=True).result().read().result()
    np.testing.assert_array_equal(np.asarray(found).view(bits), expected.view(bits))


def assert_pieces_cover(root: Path, unit: int, records: list[dict], num_units: int = 2) -> None:
    """Sizes, checksums and order of the pieces, and nothing but zeros between them."""
    for index, record in enumerate(records):
        (path,) = (root / "x").glob(f"c.{unit * len(records) + index}.*")
        content = path.read_bytes()
        assert len(content) == record["bytes"]
        end = 0
        for offset, length, checksum in record["pieces"]:
            assert not any(content[end:offset]), "pieces overlap, or bytes lie between them"
            end = offset + length
            assert checksum == f"{google_crc32c.value(content[offset:end]):08x}"
        assert end == len(content), "the index is the last piece"


# rows of a unit, of a shard, of hidden: one row; a tail inside the only chunk; two chunks, of which the
# second may be empty; four shards, of which the last may be empty; chunks of a size that is no power of two
SIZES = [(1, None, 3), (7, None, 1), (1024, None, 3), (1024, 256, 1), (300, 100, 8)]


@pytest.mark.parametrize("codec", ["none", "lossless"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint16"])
@pytest.mark.parametrize(("unit_rows", "shard_rows", "hidden"), SIZES)
def test_plain_readers_read_what_was_written(tmp_path, unit_rows, shard_rows, hidden, dtype, codec):
    for case, num_rows in enumerate(sorted({0, 1, unit_rows // 3, unit_rows})):
        root, unit = tmp_path / f"{case}.zarr", 1
        spec = state_spec(unit_rows, shard_rows, hidden, dtype, codec)
        metadata = make_array(root, spec)
        rows = noise((num_rows, DEPTHS, hidden), dtype)
        records = write_array(metadata, rows, open_sinks(root, metadata, unit))
        assert_reads(root, whole(spec, rows, unit))
        assert_pieces_cover(root, unit, records)


# one, two and four chunks of 512 rows of 8 bytes: the last of them partly filled, or none of it
@pytest.mark.parametrize("num_chunks", [1, 2, 4])
@pytest.mark.parametrize("codec", ["none", "lossless"])
def test_any_number_of_chunks_is_written_at_once(tmp_path, monkeypatch, num_chunks, codec):
    monkeypatch.setattr(shard, "_WRITE_BYTES", num_chunks * 512 * 8 + 7)
    for num_rows in (1, 513, 1024, 1500, 2048, 4000, 4096):
        root = tmp_path / f"{num_rows}.zarr"
        spec = state_spec(4096, 2048, 2, codec=codec)
        metadata = make_array(root, spec)
        rows = noise((num_rows, DEPTHS, 2), "float32")
        sinks = open_sinks(root, metadata, 1)
        assert ShardWriter(metadata, sinks).buffer_rows == 512 * num_chunks
        records = write_array(metadata, rows, sinks)
        assert_reads(root, whole(spec, rows, 1))
        assert_pieces_cover(root, 1, records)
        most = DEPTHS * -(-min(num_rows, 2048) // (512 * num_chunks))
        assert len(records[0]["pieces"]) == most + 1


def test_whole_pages_go_past_the_page_cache(tmp_path):
    """512 rows of 512 float32: compressed chunks too are written in pages, and what is added is not data."""
    for codec in ("none", "lossless"):
        root = tmp_path / f"{codec}.zarr"
        spec = state_spec(1024, None, 512, "float32", codec)
        metadata = make_array(root, spec)
        rows = noise((700, DEPTHS, 512), "float32").round(2)
        sinks = open_sinks(root, metadata, 0)
        records = write_array(metadata, rows, sinks)
        assert [sink.is_direct for sink in sinks] == [_takes_direct(tmp_path)]
        assert_reads(root, whole(spec, rows, 0))
        assert_pieces_cover(root, 0, records)
        assert records[0]["bytes"] < rows.nbytes or codec == "none"


def test_chunks_that_do_not_shrink(tmp_path):
    """Random bits come out of the compressor longer than they went in, and than the buffer."""
    spec = state_spec(1024, None, 512, "uint16", "lossless")
    metadata = make_array(tmp_path / "run.zarr", spec)
    rows = np.random.default_rng(0).integers(0, 2**16, (1024, DEPTHS, 512), np.uint16)
    records = write_array(metadata, rows, open_sinks(tmp_path / "run.zarr", metadata, 0))
    assert records[0]["bytes"] > rows.nbytes
    assert_reads(tmp_path / "run.zarr", whole(spec, rows, 0))
    assert_pieces_cover(tmp_path / "run.zarr", 0, records)


def test_uncompressed_shard_is_a_tensor_by_depth(tmp_path):
    spec = state_spec(1024, 512, 6)
    metadata = make_array(tmp_path / "run.zarr", spec)
    rows = noise((800, DEPTHS, 6), "float32")
    write_array(metadata, rows, open_sinks(tmp_path / "run.zarr", metadata, 0))
    for index in (0, 1):
        path = tmp_path / "run.zarr" / "x" / f"c.{index}.0.0"
        mapped = np.memmap(path, np.float32, "r", shape=(DEPTHS, 512, 6))
        part = rows[512 * index :][:512]
        np.testing.assert_array_equal(mapped[:, : len(part)], part.transpose(1, 0, 2))


def test_missing_chunks_are_holes(tmp_path):
    spec = state_spec(4096, None, 512)  # 24 MiB, of which one row in each depth's first 512 is there
    metadata = make_array(tmp_path / "run.zarr", spec)
    write_array(metadata, noise((1, DEPTHS, 512), "float32"), open_sinks(tmp_path / "run.zarr", metadata, 0))
    status = (tmp_path / "run.zarr" / "x" / "c.0.0.0").stat()
    assert status.st_size > 24 << 20
    assert status.st_blocks * 512 <= 3 * (1 << 20) + (64 << 10)


def test_tail_of_a_chunk_is_fill_and_not_what_the_buffer_held(tmp_path):
    spec = state_spec(512, None, 8, "uint16")
    metadata = make_array(tmp_path / "run.zarr", spec)
    ring = Ring(2, 512 * 8 * 2)
    writer = ShardWriter(metadata, open_sinks(tmp_path / "run.zarr", metadata, 0), ring)
    for depth in range(DEPTHS):
        buffer = writer.take()
        buffer[:] = 0x41  # another unit's data
        writer.put(0, depth, buffer, 5)
    writer.close()
    found = np.asarray(zarr.open_array(str(tmp_path / "run.zarr"), path="x")[:512])
    assert (found[:5] == 0x4141).all()
    assert (found[5:] == BFLOAT16_NAN).all()
    assert ring._free.qsize() == 2


# one chunk a unit: statistics of 2 and 3 axes, whole, ragged and empty, and whole numbers
@pytest.mark.parametrize("num_rows", [0, 1, 6, 7])
@pytest.mark.parametrize(("rest", "dtype"), [((5,), "float32"), ((5, 2), "float32"), ((4,), "int32")])
def test_statistics_are_one_zstd_chunk(tmp_path, num_rows, rest, dtype):
    axes = ("token", "depth", "head")[: 1 + len(rest)]
    spec = ArraySpec(axes, (14, *rest), 7, dtype, {})
    metadata = make_array(tmp_path / "run.zarr", spec)
    rows = (noise((num_rows, *rest), "float32") * 100).astype(dtype)
    records = write_array(metadata, rows, open_sinks(tmp_path / "run.zarr", metadata, 1))
    expected = np.full(spec.shape, -1 if dtype == "int32" else np.nan, dtype)
    expected[7 : 7 + num_rows] = rows
    assert_reads(tmp_path / "run.zarr", expected)
    (record,) = records
    (path,) = (tmp_path / "run.zarr" / "x").glob("c.1.*")
    assert record["bytes"] == path.stat().st_size
    content = path.read_bytes()
    assert record["pieces"] == [[0, len(content), f"{google_crc32c.value(content):08x}"]]


# of 64 depths of 1024, 512 MiB are 4096 rows, which do not always divide a unit; a prime number of rows
# is one chunk, whatever its size
@pytest.mark.parametrize(
    ("unit_rows", "expected"),
    [(4096, 4096), (16384, 4096), (20480, 4096), (5120, 2560), (512, 512), (5003, 5003)],
)
def test_shards_stay_within_512_mib(unit_rows, expected):
    spec = ArraySpec(
        ("token", "depth_state", "hidden"), (unit_rows, 64, 1024), unit_rows, "uint16", {}, "none"
    )
    assert spec.shards == (expected, 64, 1024)
    assert spec.chunks == (unit_rows if unit_rows == 5003 else 512, 1, 1024)


def test_shards_that_make_no_unit_are_refused():
    for codec, shard_rows in (("none", 5), ("lossless", 24), ("zstd", 4)):
        with pytest.raises(ValueError, match=f"shards of {shard_rows} rows do not make up a unit of 12 rows"):
            ArraySpec(("token", "depth_state", "hidden"), (12, 2, 3), 12, "float32", {}, codec, shard_rows)


def test_other_layouts_are_refused(tmp_path):
    root = str(tmp_path / "x.zarr")
    blosc = zarr.codecs.BloscCodec()
    deep = zarr.create_array(
        root, name="deep", shape=(8, 4, 2), chunks=(4, 2, 2), shards=(8, 4, 2), dtype="f4", compressors=None
    )
    packed = zarr.create_array(root, name="packed", shape=(8, 4), chunks=(4, 1), shards=(8, 4), dtype="f4")
    for array in (deep, packed):
        with pytest.raises(ValueError, match="shards of this layout cannot be written"):
            ShardWriter(array.metadata.to_dict() | {"data_type": "float32"}, [])
    plain = zarr.create_array(
        root, name="plain", shape=(8, 4), chunks=(4, 4), dtype="f4", compressors=[blosc]
    )
    with pytest.raises(ValueError, match="chunks of this layout cannot be written"):
        encode(plain.metadata.to_dict(), np.zeros((4, 4), np.float32))
    metadata = make_array(tmp_path / "run.zarr", state_spec(4, None, 2))
    with pytest.raises(ValueError, match="the ring's buffers hold 31 bytes, and 32 are written"):
        ShardWriter(metadata, [], Ring(1, 31))


class FakeSink:
    """Calls `before_write` with the offset, and notes how it was left."""

    def __init__(self, before_write: Callable[[int], None]) -> None:
        self._before_write, self.ended = before_write, ""

    def write_at(self, offset: int, data: object) -> None:
        self._before_write(offset)

    def close(self, num_bytes: int) -> None:
        self.ended = "closed"

    def discard(self) -> None:
        self.ended = "discarded"


# the first write fails; one in the middle, with a ring far smaller than what follows; the last one, when
# nothing is taken any more; the index of the first shard
@pytest.mark.parametrize("good_writes", [0, 5, 4 * DEPTHS - 1, 4 * DEPTHS])
@pytest.mark.parametrize("codec", ["none", "lossless"])
def test_failed_write_reaches_the_producer(tmp_path, good_writes, codec):
    metadata = make_array(tmp_path / "run.zarr", state_spec(512, 128, 2, codec=codec))
    offsets = []

    def run_full(offset: int) -> None:
        """Fails one write as a full disk does; there is room again afterwards."""
        offsets.append(offset)
        if len(offsets) == good_writes + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sinks = [FakeSink(run_full) for _ in range(4)]
    ring = Ring(2, 128 * 2 * 4)
    writer = ShardWriter(metadata, sinks, ring, num_threads=1)
    with pytest.raises(OSError, match="No space left"):
        put_all(writer, 4)
    writer.abort()
    assert len(offsets) == good_writes + 1, "nothing is written after an error"
    assert [sink.ended for sink in sinks] == ["discarded"] * 4
    assert ring._free.qsize() == 2, "every buffer came back"


def test_failed_array_leaves_nothing(tmp_path):
    """Found while more is to be written, and when all was."""
    metadata = make_array(tmp_path / "run.zarr", state_spec(512, 128, 2))
    for num_rows in (1, 512):

        def fail(offset: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        sinks = [FakeSink(fail) for _ in range(4)]
        with pytest.raises(OSError, match="Input/output error"):
            write_array(metadata, noise((num_rows, DEPTHS, 2), "float32"), sinks)
        assert [sink.ended for sink in sinks] == ["discarded"] * 4


def put_all(writer: ShardWriter, num_blocks: int) -> None:
    for block in range(num_blocks):
        for depth in range(DEPTHS):
            writer.put(block, depth, writer.take(), 128)
    writer.close()


def test_producer_waits_for_a_slow_disk(tmp_path):
    metadata = make_array(tmp_path / "run.zarr", state_spec(512, 128, 2))
    gate, begun, written = threading.Event(), [], []

    def write_slowly(offset: int) -> None:
        begun.append(offset)
        gate.wait()
        written.append(offset)

    ring = Ring(5, 128 * 2 * 4)
    writer = ShardWriter(metadata, [FakeSink(write_slowly) for _ in range(4)], ring, num_threads=2)
    producer = threading.Thread(target=put_all, args=(writer, 4))
    producer.start()
    for _ in range(60_000):
        if not ring._free.qsize() and len(begun) == 2:
            break
        time.sleep(0.001)
    assert (len(begun), written) == (2, []), (
        "two threads write, three buffers wait, and the producer with them"
    )
    gate.set()
    producer.join()
    assert len(written) == 4 * DEPTHS + 4


def test_buffer_is_read_when_its_copy_has_ended(tmp_path):
    """`ready` stands for the event that a GPU's copy raises."""
    spec = state_spec(128, None, 4)
    metadata = make_array(tmp_path / "run.zarr", spec)
    writer = ShardWriter(metadata, open_sinks(tmp_path / "run.zarr", metadata, 0))
    rows = noise((128, DEPTHS, 4), "float32")
    for depth in range(DEPTHS):
        buffer = writer.take()
        buffer[:] = 0
        late = np.ascontiguousarray(rows[:, depth]).view(np.uint8).reshape(-1)
        writer.put(0, depth, buffer, 128, ready=lambda to=buffer, late=late: np.copyto(to, late))
    writer.close()
    assert_reads(tmp_path / "run.zarr", whole(spec, rows, 0))


def test_failed_copy_reaches_the_producer(tmp_path):
    metadata = make_array(tmp_path / "run.zarr", state_spec(128, None, 4))
    writer = ShardWriter(metadata, open_sinks(tmp_path / "run.zarr", metadata, 0))

    def fail() -> None:
        raise RuntimeError("CUDA error")

    with pytest.raises(RuntimeError, match="CUDA error"):
        for depth in range(DEPTHS):
            writer.put(0, depth, writer.take(), 128, ready=fail)
        writer.close()
    writer.abort()
    assert list((tmp_path / "run.zarr" / "x").glob("c.*")) == []


# depth 2 has no block 1; block 0 is missing before block 1
@pytest.mark.parametrize("depths_of_blocks", [[3, 2], [0, 3]])
def test_rows_that_are_missing_are_noticed(tmp_path, depths_of_blocks):
    metadata = make_array(tmp_path / "run.zarr", state_spec(1024, 512, 4))
    writer = ShardWriter(metadata, open_sinks(tmp_path / "run.zarr", metadata, 0))
    for block, num_depths in enumerate(depths_of_blocks):
        for depth in range(num_depths):
            writer.put(block, depth, writer.take(), 512)
    with pytest.raises(AssertionError, match="rows"):
        writer.close()
    assert list((tmp_path / "run.zarr" / "x").glob("c.*")) == []


def test_rows_put_twice_are_noticed(tmp_path):
    metadata = make_array(tmp_path / "run.zarr", state_spec(512, None, 4))
    writer = ShardWriter(metadata, open_sinks(tmp_path / "run.zarr", metadata, 0))
    writer.put(0, 1, writer.take(), 512)
    with pytest.raises(AssertionError, match="row block 0 of shard 0 at depth 1 was put twice"):
        writer.put(0, 1, writer.take(), 3)
    writer.abort()


def test_abort_leaves_nothing(tmp_path):
    metadata = make_array(tmp_path / "run.zarr", state_spec(512, 256, 4))
    ring = Ring(4, 256 * 4 * 4)
    writer = ShardWriter(metadata, open_sinks(tmp_path / "run.zarr", metadata, 0), ring)
    writer.put(0, 0, writer.take(), 256)
    writer.abort()
    writer.abort()
    assert list((tmp_path / "run.zarr" / "x").glob("c.*")) == []
    assert ring._free.qsize() == 4


def test_file_sink_without_direct_writes(tmp_path, monkeypatch):
    """A file system that takes O_DIRECT at opening and refuses it at the first write."""
    real, refused = os.pwrite, []
    sink = FileSink(tmp_path / "file")

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if descriptor == sink._direct:
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(
            descriptor, data[: 3 * PAGE_BYTES // 2], offset
        )  # and which writes less than it was given

    monkeypatch.setattr(os, "pwrite", pwrite)
    data = page_aligned(4 * PAGE_BYTES)
    data[:] = np.arange(len(data)) % 251
    sink.write_at(2 * PAGE_BYTES, data)
    sink.write_at(0, data[: 2 * PAGE_BYTES])
    sink.close(6 * PAGE_BYTES + 1)
    assert sink.is_direct is False
    assert refused == [2 * PAGE_BYTES]
    content = bytes(data[: 2 * PAGE_BYTES]) + bytes(data) + b"\0"
    assert (tmp_path / "file").read_bytes() == content


def test_file_sink_sends_whole_pages_past_the_cache(tmp_path):
    """Whole pages in memory, in the file and in length; anything else would be refused by the system."""
    sink, data = FileSink(tmp_path / "file"), page_aligned(3 * PAGE_BYTES)
    data[:] = np.arange(len(data)) % 251
    sink.write_at(0, data[1 : 1 + PAGE_BYTES])
    sink.write_at(PAGE_BYTES + 1, data[:PAGE_BYTES])
    sink.write_at(3 * PAGE_BYTES, data[: PAGE_BYTES - 1])
    assert sink.is_direct is None
    sink.write_at(4 * PAGE_BYTES, data)
    assert sink.is_direct == _takes_direct(tmp_path)
    sink.close(7 * PAGE_BYTES)
    found, bytes_ = np.fromfile(tmp_path / "file", np.uint8), np.zeros(7 * PAGE_BYTES, np.uint8)
    for start, part in ((0, data[1 : 1 + PAGE_BYTES]), (PAGE_BYTES + 1, data[:PAGE_BYTES]),
                        (3 * PAGE_BYTES, data[: PAGE_BYTES - 1]), (4 * PAGE_BYTES, data)):  # fmt: skip
        bytes_[start : start + len(part)] = part
    np.testing.assert_array_equal(found, bytes_)


def test_what_went_through_the_cache_is_dropped_from_it(tmp_path, monkeypatch):
    """Only clean pages are: it must be synced first."""
    calls = []
    monkeypatch.setattr(file_sink, "_DROP_BYTES", 2 * PAGE_BYTES)
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: calls.append("sync"))
    monkeypatch.setattr(os, "posix_fadvise", lambda descriptor, start, size, advice: calls.append(advice))
    for num_bytes in (PAGE_BYTES - 1, PAGE_BYTES + 1, 2 * PAGE_BYTES + 1):
        sink = FileSink(tmp_path / str(num_bytes))
        sink.write_at(0, bytes(num_bytes))
        sink.close(num_bytes)
        calls.append("closed")
    drop = os.POSIX_FADV_DONTNEED
    assert calls == ["closed", drop, "closed", drop, "sync", drop, "closed"]


def test_file_sink_takes_no_name_that_is_taken(tmp_path):
    (tmp_path / "file").write_bytes(b"other")
    with pytest.raises(FileExistsError):
        FileSink(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"other"


def _takes_direct(folder: Path) -> bool:
    try:
        os.close(os.open(folder / "probe", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    finally:
        (folder / "probe").unlink(missing_ok=True)
    return True
