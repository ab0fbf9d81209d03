"""The count of passes that lookup decoding would take."""

from benchmarks.lookup import main, passes


def test_passes():
    assert passes([1, 2, 3, 4, 5, 6], [7, 8, 9]) == 3  # nothing is copied
    assert passes([1, 2, 3, 4, 5, 6, 1], [2, 3, 4, 5, 6]) == 1  # a draft of four, and the pass's own token
    assert passes([1, 2, 3, 4, 1], [2, 9, 9]) == 2  # the second token of the draft is wrong
    assert passes([], [1]) == 1


def test_the_demo(tmp_path, capsys):
    from demo.make_data import make_data
    from process_image import main as process

    make_data(tmp_path, photos=4, seed=0)
    place = (
        f"{{name: x, format: llava, annotations: {tmp_path}/llava/annotations.json, images: {tmp_path}/llava/photos}}"
    )
    files = [f"data.image_map={tmp_path}/map.json", f"data.captions={tmp_path}/captions.json"]
    options = ["--config", "configs/demo.yaml", f"data.sources=[{place}]", *files]
    process(options)
    main([*options, "--answers", "9"])
    assert '"tokens_per_pass": 1.' in capsys.readouterr().out
