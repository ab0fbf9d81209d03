"""Names of the passes of an evaluation, which `passes.py` makes. `eval_vqa.py --help` lists them, so without torch."""

TRAINED = "trained"  # the pass of the model as it is, with the own photo
BASELINES = {
    "blind": "with another photo",
    "text": "without any photo",
    "untrained": "with an untrained projector",
    "majority": "the type's most frequent answer",
}
NEEDS_WEIGHTS = "untrained"  # the baseline that a server cannot give
