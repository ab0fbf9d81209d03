"""States of new tokens behind a packed row are those of transformers' own pass over each whole sequence."""

import pytest
import torch

from batch import sample_positions
from model.model import MMultiModal
from qwen import branches
from qwen.branches import BranchCache
from tests.tiny import tiny_config, write_qwen

# float64, where different orders of summation differ by less than 1e-12; rotary angles are float32 on both sides
TOLERANCE = 1e-9
LENGTHS = ((6, 3, 1, 4), (11, 2), (1, 5, 5), (20, 2, 1))
STEPS = 7


@pytest.fixture(scope="module", params=["qwen1", "qwen2-tied", "qwen3-untied", "llama-untied", "sliding"])
def model(request, backbones, tmp_path_factory):
    folder = backbones / request.param
    if request.param == "sliding":  # one layer sees four tokens, fewer than a prefix has
        window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
        folder = write_qwen(tmp_path_factory.mktemp("sliding"), "qwen2", **window)
    config = tiny_config(backbones, llm={"path": str(folder)})
    return MMultiModal.from_config(config, dtype=torch.float64).eval()


def last_logits(model, ids):
    """(V,) of an ordinary pass over one sequence."""
    return model(None, torch.tensor([ids]), logits_to_keep=1).logits[0, -1]


# questions of each pass: in any number, and until samples 0 to 2 have ended
@pytest.mark.parametrize("room", [1, 16])
@torch.no_grad()
def test_new_tokens_equal_whole_sequences(model, room, monkeypatch):
    monkeypatch.setattr(branches, "ROOM", room)  # with 1, the cache grows on the way
    language_model = model.language_model
    draw = torch.Generator().manual_seed(0)

    def random_ids(count):
        return torch.randint(0, 250, (count,), generator=draw).tolist()

    row, last, sequences = [], [], []
    for prefix, *own in LENGTHS:
        shared = random_ids(prefix)
        row += shared
        for length in own:
            sequences.append([*shared, *random_ids(length)])
            row += sequences[-1][prefix:]
            last.append(len(row) - 1)
    selected = torch.zeros(1, len(row), dtype=torch.bool)
    selected[0, last] = True
    positions = torch.cat([sample_positions(lengths) for lengths in LENGTHS])[None]
    cache = BranchCache(LENGTHS, [STEPS] * len(sequences), language_model.config.num_hidden_layers, model.device)
    embed = language_model.get_input_embeddings()
    states = language_model.packed_states(embed(torch.tensor([row])), positions, LENGTHS, selected, cache)
    going_on = list(range(len(sequences)))
    for step in range(STEPS + 1):
        for question, logits in zip(going_on, language_model.lm_head(states), strict=True):
            expected = last_logits(model, sequences[question])
            torch.testing.assert_close(logits, expected, rtol=TOLERANCE, atol=TOLERANCE, msg=f"{question} at {step}")
        # questions end one after the other, in an order that empties whole samples
        ended = {2: {1}, 3: {3, 0}, 4: {2}, 5: {4, 5}, 6: {7}}.get(step, set())
        going_on = [question for question in going_on if question not in ended]
        if step < STEPS:
            new = random_ids(len(going_on))
            for question, token in zip(going_on, new, strict=True):
                sequences[question].append(token)
            positions = cache.begin_pass(going_on)
            assert positions[0].tolist() == [len(sequences[question]) - 1 for question in going_on]
            states = language_model.packed_states(embed(torch.tensor([new])), positions, None, cache=cache)[0]
    assert going_on == [6]
    assert len(cache._used) == 1, "samples whose questions have ended are dropped"


def test_memory_is_what_the_answers_may_need():
    cache = BranchCache(((10, 2, 3), (4, 5)), [3, 2, 30], 1, torch.device("cpu"))
    assert cache.slots <= 2 * (4 + 5 + 30)
    row = torch.zeros(1, 1, 10 + 2 + 3 + 4 + 5, 1)
    cache.keep(0, row, row)
    for _ in range(30):
        cache.begin_pass([2])  # sample 0 has ended
    assert cache.slots == 4 + 5 + 30
