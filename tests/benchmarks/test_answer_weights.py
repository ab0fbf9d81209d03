"""The benchmark of weights compares ways to hold them that answer alike, and writes its figures."""

import json

from benchmarks import answer_weights


def test_figures_of_the_tiny_shape(tmp_path):
    output = tmp_path / "figures.json"
    answer_weights.main(["--tokens", "3", "--runs", "1", "--sides", "merged", "bf16", "--output", str(output)])
    sides = json.loads(output.read_text())["sides"]
    assert sides.keys() == {"apart", "merged", "bf16"}
    assert all(side[name] > 0 for side in sides.values() for name in side if not name.startswith("largest"))
    assert sides["apart"]["largest_logit_difference"] == 0
    assert 0 < sides["merged"]["largest_logit_difference"] < 0.01 * sides["bf16"]["largest_logit_difference"]
    assert sides["merged"]["weights_mib"] <= sides["apart"]["weights_mib"]
