import ast
from pathlib import Path

from sparsegate.data import TextOptions, prepare, standard_library_files


def test_files_are_sources_of_the_standard_library_sorted_and_not_tests() -> None:
    files = standard_library_files()
    assert files == sorted(set(files)) == standard_library_files()
    assert {Path(ast.__file__), Path(ast.__file__).parent / "json/decoder.py"} <= set(files)
    assert len(files) > 300
    assert 5 << 20 < sum(file.stat().st_size for file in files) < 30 << 20
    for file in files:
        assert file.suffix == ".py"
        assert not {"site-packages", "test", "tests", "encodings"} & set(file.parts)


def test_whole_files_are_held_out_of_it_and_always_the_same(tmp_path: Path) -> None:
    files = standard_library_files()[:60]
    options = {"vocabulary": "bytes", "hold_out": "files", "valid_share": 0.1, "test_share": 0.1}
    text = TextOptions(keep_blank_lines=True)
    once = prepare(output=tmp_path / "once", train=files, text=text, **options)
    again = prepare(output=tmp_path / "again", train=files[::-1], text=text, **options)
    split_of = {source.name: name for name, split in once.splits.items() for source in split.manifest.sources}
    assert len(split_of) == 60
    total = sum(file.stat().st_size for file in files)
    for name in ("valid", "test"):
        assert sorted(again.split(name).manifest.sources, key=str) == sorted(
            once.split(name).manifest.sources, key=str
        )
        assert 0.1 * total <= sum(source.bytes for source in once.split(name).manifest.sources) < 0.4 * total
