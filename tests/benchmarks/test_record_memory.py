"""The records that the benchmark makes by SQL are those that `process_image.py` makes of its rows."""

import process_image
from benchmarks.record_memory import make_records, write_config, write_rows
from dataset.records import read_records


def test_records_made_by_sql_are_the_prepared_ones(tmp_path):
    made, prepared = tmp_path / "made", tmp_path / "prepared"
    for folder in (made, prepared):
        folder.mkdir()
    make_records(made, 120)
    write_rows(prepared / "rows.jsonl", 120)
    process_image.main(["--config", str(write_config(prepared, "sqlite"))])
    photos, entries = zip(
        *(read_records(folder / "image_map.sqlite", folder / "captions.sqlite") for folder in (made, prepared)),
        strict=True,
    )
    assert list(entries[0]) == list(entries[1])
    assert [photo.image_file for photo in photos[0].values()] == [photo.image_file for photo in photos[1].values()]
    assert len(entries[0]) == 120
