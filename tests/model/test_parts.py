"""Every way to train a part: what learns, what a checkpoint holds, and that it comes back bit for bit."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, SiglipVisionModel, ViTModel

from config import LlmSettings
from errors import UserError
from model.checkpoint import load_checkpoint
from model.model import MMultiModal
from model.parts import llm_parts
from tests.tiny import IMAGE_SIZE, tiny_config
from tests.visual.test_vit import write as write_tower
from training.loop import Trainer

PROJECTOR, LORA = r"feature_proj\.\d\.(weight|bias)", r"LLM\..*\.lora_[AB]\.default\.weight"
VISION_LORA = r"encoder\..*\.lora_[AB]\.default\.weight"
PROJECTOR_FILE, LORA_FILES = "feature_proj.safetensors", ["adapter_config.json", "adapter_model.safetensors"]
VISION_LORA_FILES = [f"vision_adapter/{name}" for name in LORA_FILES]
LAYER_1 = r"LLM\.base_model\.model\.model\.layers\.1\.(?!.*lora_).*"
LLM = {"mode": "lora", "lr": 1e-2}


def mode(trained, files, groups, **parts):
    """Patterns of the trained weights, files of the checkpoint, names of the optimizer's groups, `train.parts`."""
    return trained, files, groups, {"projector": {"lr": 1e-2}, "llm": LLM} | parts


MODES = {
    "lora": mode([PROJECTOR, LORA], [PROJECTOR_FILE, *LORA_FILES], ["projector", "lora"]),
    "full": mode(
        [PROJECTOR, r"LLM\..*"],
        [PROJECTOR_FILE, "llm.safetensors"],
        ["projector", "llm"],
        llm={"mode": "full", "lr": 1e-3},
    ),
    "frozen": mode([PROJECTOR], [PROJECTOR_FILE], ["projector"], llm={"mode": "frozen"}),
    "hybrid": mode(
        [PROJECTOR, LAYER_1, r"LLM\..*\.layers\.0\..*\.lora_[AB]\.default\.weight"],
        [PROJECTOR_FILE, "llm.safetensors", *LORA_FILES],
        ["projector", "llm", "lora"],
        llm=LLM | {"layers": [1]},
    ),
    "full of one layer": mode(
        [PROJECTOR, r"LLM\.model\.layers\.0\..*"],
        [PROJECTOR_FILE, "llm.safetensors"],
        ["projector", "llm"],
        llm={"mode": "full", "layers": [0], "lr": 1e-3},
    ),
    "vision lora": mode(
        [PROJECTOR, LORA, VISION_LORA],
        [PROJECTOR_FILE, *LORA_FILES, *VISION_LORA_FILES],
        ["projector", "lora", "vision_lora"],
        vision={"mode": "lora", "lr": 1e-2},
    ),
    "vision full": mode(
        [PROJECTOR, LORA, r"encoder\..*"],
        [PROJECTOR_FILE, *LORA_FILES, "vision.safetensors"],
        ["projector", "lora", "vision"],
        vision={"mode": "full", "lr": 1e-3},
    ),
    "all": mode(
        [r".*"],
        [PROJECTOR_FILE, "llm.safetensors", "vision.safetensors"],
        ["projector", "llm", "vision"],
        llm={"mode": "full", "lr": 1e-3},
        vision={"mode": "full", "lr": 1e-3},
    ),
    "lora at 0": mode(
        [PROJECTOR], [PROJECTOR_FILE, *LORA_FILES], ["projector"], llm=LLM | {"lr": 0}, vision={"mode": "frozen"}
    ),
    "projector at 0": mode([LORA], [PROJECTOR_FILE, *LORA_FILES], ["lora"], projector={"lr": 0}),
    "vision full at 0": mode(
        [PROJECTOR, LORA],
        [PROJECTOR_FILE, *LORA_FILES, "vision.safetensors"],
        ["projector", "lora"],
        vision={"mode": "full", "lr": 0},
    ),
}
STEPS = 3


def configured(backbones, output, parts, **train):
    """A run with dropout, so that a resumed one needs the generators' state, and that saves each step."""
    lora = {"r": 4, "alpha": 8, "dropout": 0.2}
    settings = {"output_dir": str(output), "max_steps": STEPS, "save_steps": 1, "save_total_limit": 9, "trackers": []}
    return tiny_config(
        backbones,
        llm={"path": str(backbones / "qwen"), "lora": lora},
        visual={"path": str(backbones / "siglip"), "lora": lora},
        train=settings
        | {"micro_batch": 2, "workers": 0, "log_steps": 1, "parts": parts, "precision": "float32"}
        | train,
    ).model_copy(update={"model_root": str(backbones)})


def files_of(folder):
    """Weight files and adapter settings of a checkpoint."""
    return {
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.suffix == ".safetensors" or file.name == "adapter_config.json"
    }


def tensors_of(folder):
    """All trained tensors of a checkpoint by file and name."""
    return {
        (file.name, name): tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same(first, second):
    first, second = tensors_of(first), tensors_of(second)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert different == []


@pytest.fixture(scope="module", params=MODES)
def run(request, backbones, tmp_path_factory):
    """(name of the mode, trainer after three steps, weights before them, last checkpoint)."""
    parts = MODES[request.param][-1]
    trainer = Trainer(configured(backbones, tmp_path_factory.mktemp("parts") / "run", parts))
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    return request.param, trainer, before, trainer.run()


def is_trained(kind, name):
    return any(re.fullmatch(pattern, name) for pattern in MODES[kind][0])


def test_what_learns_and_what_stays(run):
    kind, trainer, before, _ = run
    groups = [group["name"] for group in trainer.optimizer.param_groups]
    assert list(dict.fromkeys(groups)) == MODES[kind][2]
    in_groups = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        wanted = is_trained(kind, name)
        assert parameter.requires_grad == wanted, name
        assert (id(parameter) in in_groups) == wanted, name
        # AdamW moves a weight by its rate even where rounding alone makes the gradient; bit for bit otherwise
        assert torch.equal(parameter, before[name]) != wanted, name
    if kind == "hybrid":
        assert not any("lora_" in name for name in before if ".layers.1." in name)
        assert sum("lora_A" in name for name in before if ".layers.0." in name) == 7


def test_log_and_checkpoint_name_the_parts(run):
    kind, trainer, _, folder = run
    assert files_of(folder) == set(MODES[kind][1])
    line = json.loads((folder.parent / "metrics.jsonl").read_text().splitlines()[0])
    rates = {name.removesuffix("_lr") for name in line if name.endswith("_lr")}
    assert rates == {part.name for part in trainer.model.parts}
    assert {name for name in rates if line[f"{name}_lr"] > 0} == set(MODES[kind][2])
    checksums = json.loads((folder / "provenance.json").read_text())["checksums"]
    assert set(checksums) == {name for name in MODES[kind][1] if "config" not in name} | {"trainer_state/state.pt"}


@torch.no_grad()
def test_the_same_logits_after_loading(run, backbones):
    _, trainer, _, folder = run
    loaded = load_checkpoint(folder, overrides={"model_root": backbones}, merge_lora=False)
    model = trainer.model.eval()
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    ids = torch.tensor([model.processor.chat.render([model.processor.chat.typed_question("What?", 1)])[0]])
    assert torch.equal(loaded(pixels, ids).logits, model(pixels, ids).logits)
    tied = loaded.language_model
    assert tied.get_input_embeddings().weight is tied.get_output_embeddings().weight
    half = load_checkpoint(folder, dtype=torch.bfloat16, overrides={"model_root": backbones})
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half(pixels, ids).logits.isfinite().all()


def test_resumed_equals_uninterrupted(run, backbones, tmp_path):
    kind, _, _, folder = run
    shutil.copytree(folder.parent / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    resumed = Trainer(configured(backbones, tmp_path / "part", MODES[kind][-1]), resume="auto")
    assert resumed.progress.step == 2
    assert_same(resumed.run(), folder)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own call
@torch.no_grad()
def test_peft_loads_the_adapters(run, backbones):
    kind, trainer, _, folder = run
    if "adapter_config.json" in MODES[kind][1]:
        base = AutoModelForCausalLM.from_pretrained(backbones / "qwen")
        if kind == "hybrid":  # the layers trained whole are a plain state dict
            assert base.load_state_dict(load_file(folder / "llm.safetensors"), strict=False).unexpected_keys == []
        ids = torch.tensor([[1, 2, 3, 4]])
        theirs = PeftModel.from_pretrained(base, folder).eval()(ids).logits
        # 1e-5: our LoRA layers add in another order
        torch.testing.assert_close(trainer.model.eval().LLM(ids).logits, theirs, rtol=1e-5, atol=1e-5)
    if kind == "vision lora":
        bare = SiglipVisionModel.from_pretrained(backbones / "siglip", vision_use_head=False)
        theirs = PeftModel.from_pretrained(bare, folder / "vision_adapter").eval()
        assert_same_features(trainer.model, theirs, bare)


@torch.no_grad()
def assert_same_features(model, theirs, bare):
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    expected = theirs(pixel_values=pixels).last_hidden_state[:, model.encoder.dropped :]
    torch.testing.assert_close(model.eval().encode_image(pixels), expected, rtol=1e-5, atol=1e-5)
    with theirs.disable_adapter():  # else an adapter that was not found would pass
        assert not torch.allclose(theirs(pixel_values=pixels).last_hidden_state[:, model.encoder.dropped :], expected)
    settings = theirs.peft_config["default"]
    assert not settings.base_model_name_or_path.startswith("/")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own call
def test_peft_loads_the_adapter_of_a_tower_that_holds_its_model(backbones, tmp_path):
    write_tower(tmp_path / "vit", "vit")
    config = configured(backbones, tmp_path / "run", MODES["vision lora"][-1], max_steps=2)
    config.visual.path = str(tmp_path / "vit")
    trainer = Trainer(config)
    folder = trainer.run()
    bare = ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False)
    theirs = PeftModel.from_pretrained(bare, folder / "vision_adapter").eval()
    assert_same_features(trainer.model, theirs, bare)


MIXED = ["full", "hybrid", "full of one layer", "vision lora", "vision full", "all", "vision full at 0"]


@pytest.mark.parametrize("kind", MIXED)
def test_trained_weights_are_float32_among_bf16(backbones, tmp_path, whole_reports, kind):
    config = configured(backbones, tmp_path / "run", MODES[kind][-1], precision="bf16", max_steps=2)
    config.data.val_fraction = 0.4
    trainer = Trainer(config)
    for name, parameter in trainer.model.named_parameters():
        frozen = torch.bfloat16 if "lora_" not in name and "feature_proj" not in name else torch.float32
        assert parameter.dtype == (torch.float32 if is_trained(kind, name) else frozen), name
    folder = trainer.run()
    assert all(tensor.isfinite().all() for tensor in tensors_of(folder).values())
    answers = json.loads((tmp_path / "run" / "samples.json").read_text())
    attempts = [attempt for item in answers for attempt in item["attempts"].values()]
    assert attempts
    assert [text for text, _, failed in attempts if failed] == []


def refusal(backbones, tmp_path, parts, data=None, **train):
    config = configured(backbones, tmp_path / "run", parts, **train)
    config = config.model_copy(update={"data": config.data.model_copy(update=data or {})})
    with pytest.raises(UserError) as caught:
        Trainer(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mistakes_are_one_sentence(backbones, tmp_path):
    layers = LLM | {"layers": [0, 2]}
    assert "there is no layer 2, the language model has layers 0 to 1" in refusal(backbones, tmp_path, {"llm": layers})
    every = LLM | {"layers": [0, 1]}
    assert "no layer is left for LoRA: set train.parts.llm.mode=full" in refusal(backbones, tmp_path, {"llm": every})
    nothing = {"llm": {"mode": "frozen"}, "projector": {"lr": 0}}
    for settings in ({}, {"micro_batch": "auto", "samples_per_step": 2}):
        assert "nothing is trained" in refusal(backbones, tmp_path, nothing, **settings)
    cached = {"cache_features": True, "feature_cache": str(tmp_path / "features")}
    vision = {"vision": {"mode": "lora"}}
    assert "set data.cache_features=false" in refusal(backbones, tmp_path, vision, cached)
    near = refusal(backbones, tmp_path, {"visoin": {"lr": 1e-3}})
    assert near == "'train.parts.visoin' is not a part that can be trained, did you mean 'vision'?"


def test_lora_with_a_rate_of_zero_is_stored_as_it_was(backbones, tmp_path):
    rates = {"projector": {"lr": 1e-2}, "llm": LLM, "vision": {"mode": "lora", "lr": 1e-2}}
    first = Trainer(configured(backbones, tmp_path / "first", rates, precision="bf16")).run()
    rest = {"projector": {"lr": 1e-2}, "llm": LLM | {"lr": 0}, "vision": {"mode": "lora", "lr": 0}}
    second = Trainer(configured(backbones, tmp_path / "second", rest, precision="bf16", init_from=str(first))).run()
    for name in ("adapter_model.safetensors", "vision_adapter/adapter_model.safetensors"):
        before, after = load_file(first / name), load_file(second / name)
        assert all(torch.equal(after[key], tensor) and tensor.any() for key, tensor in before.items())


@pytest.mark.parametrize(
    "settings", [{"mode": "full"}, {"mode": "full", "layers": [0]}, {"mode": "lora", "layers": [0]}]
)
def test_quantised_weights_are_not_trained(backbones, settings):
    config = tiny_config(backbones, llm={"path": "qwen", "quantization": "nf4"})
    network = SimpleNamespace(config=config, LLM=AutoModelForCausalLM.from_pretrained(backbones / "qwen"))
    with pytest.raises(UserError, match=r"'llm.quantization' is nf4, .* set train.parts.llm.mode=lora and "):
        llm_parts(network, LlmSettings(**settings))


def test_untied_embeddings_are_trained_apart(backbones, tmp_path):
    config = configured(backbones, tmp_path / "run", MODES["full"][-1])
    config.llm.path = str(backbones / "qwen2-untied")
    folder = Trainer(config).run()
    assert "lm_head.weight" in load_file(folder / "llm.safetensors")
    loaded = load_checkpoint(folder, overrides={"model_root": backbones}).language_model
    assert not torch.equal(loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight)
    first = MMultiModal.from_config(config).language_model.get_output_embeddings().weight
    assert not torch.equal(first, loaded.get_output_embeddings().weight)


def test_a_misspelt_part_is_named_before_data_and_models_are_read(configure):
    missing = {"captions": "/nowhere/captions.json"}
    with pytest.raises(UserError, match=r"'train\.parts\.visoin' is not a part .*, did you mean 'vision'\?"):
        Trainer(configure(data=missing, parts={"visoin": {"lr": 1e-3}}))
