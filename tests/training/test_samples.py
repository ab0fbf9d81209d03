"""What is printed of a sample is what is learned, and samples.html shows the answers without changing the training."""

import json
import logging
import re
import shutil
from collections import Counter

import pytest
import torch
from PIL import Image

from answering.request import Reply, ReplyStream
from dataset.image_caption_dataset import ImageCaptionDataset, collate
from dataset.records import Entry, Photo, Turn, read_records
from evaluation import screenshots
from model.model import MMultiModal
from qwen.chat import IGNORE_INDEX
from tests.tiny import tiny_config
from training import samples
from training.data import PixelLoader
from training.sample_page import Attempt, render_page
from training.samples import MAX_NEW_TOKENS, SampleSheet, choose_entries, describe_sample

TAG = "<|extra_0|>"
pytestmark = pytest.mark.usefixtures("whole_reports")


def entry(question, *answers, images=(0,), source="tiny", kind=""):
    return Entry(source, kind or source, (Turn(question, answers, images=images),))


@pytest.fixture(scope="module")
def workshop_model(workshop):
    lora = {"path": str(workshop / "qwen"), "lora": {"r": 4, "alpha": 8, "dropout": 0.3}}
    return MMultiModal.from_config(tiny_config(workshop, llm=lora))


@pytest.fixture
def model(workshop_model):
    """In eval mode, as the page wants it."""
    return workshop_model.eval()


@pytest.fixture(scope="module")
def records(workshop):
    return read_records(workshop / "image_map.json", workshop / "captions.json")


def marked(text):
    return "".join(re.findall("⟦(.*?)⟧", text, re.DOTALL))


class FakeAnswerer:
    """Answers each question with `reply(question)` instead of a model; its decoding settings are remembered."""

    settings = None

    def __init__(self, model):
        self.model = model

    def stream_messages(self, images, messages, settings):
        type(self).settings = settings
        return ReplyStream(self.pieces(messages))

    def pieces(self, messages):
        assert [message.role for message in messages] == ["user"]
        pieces = list(self.reply("".join(part for part in messages[0].parts if isinstance(part, str)).strip()))
        yield from pieces
        return Reply("".join(pieces), "stop", 1, len(pieces))


@pytest.fixture
def reply_with(monkeypatch):
    def install(reply):
        monkeypatch.setattr(samples, "Answerer", type("Replying", (FakeAnswerer,), {"reply": staticmethod(reply)}))
        return samples.Answerer

    return install


@pytest.mark.parametrize("max_questions", [1, 8])
def test_the_marked_parts_are_the_answers_with_their_ends(model, records, max_questions):
    photos, _ = records
    entries = [
        entry(f"{TAG}\n这是什么颜色？", "红色，很红 🟥"),
        Entry("tiny", "tiny", (Turn(f"{TAG}\nWhy?", ("因为⟨café⟩",), images=(0,)), Turn("And then?", ("没有了。",)))),
        entry("你好", "你好！", images=()),
    ]
    dataset = ImageCaptionDataset(photos, entries, model.processor.chat, None, max_questions=max_questions)
    texts = [describe_sample(dataset, index) for index in range(len(dataset))]
    assert marked("".join(texts[:-1])) == "红色，很红 🟥<|im_end|>因为⟨café⟩<|im_end|>没有了。<|im_end|>"
    assert marked(texts[-1]) == "你好！<|im_end|>"
    for index, text in enumerate(texts):
        assert "\ufffd" not in text
        labels = dataset.tokens(index).labels
        supervised = labels[labels != IGNORE_INDEX]
        assert marked(text) == model.processor.tokenizer.decode(supervised)
        assert f"{len(labels)} tokens, the {len(supervised)} in double brackets are supervised" in text
    assert texts[0].count(f"{TAG} × {model.processor.chat.plan.crop_tokens}") == 1
    assert texts[0].count(TAG) == 1
    assert "<|im_start|>user\n" in texts[0]
    assert "这是什么颜色？<|im_end|>\n<|im_start|>assistant\n⟦红色" in texts[0]
    assert ("--- question 2 of 2 on the same photo ---" in texts[0]) == (max_questions > 1)


def test_several_photos_are_counted_one_by_one(model, records):
    dataset = ImageCaptionDataset(
        records[0], [entry(f"{TAG}{TAG} same?", "no", images=(0, 1))], model.processor.chat, None
    )
    assert f"user\n{f'{TAG} × {model.processor.chat.plan.crop_tokens}' * 2} same?" in describe_sample(dataset, 0)


def test_a_sample_of_many_questions_is_cut_and_one_too_long_is_no_crash(model, records):
    entries = [entry(f"{TAG}\nnumber {number}?", str(number)) for number in range(16)]
    dataset = ImageCaptionDataset(records[0], entries, model.processor.chat, None, max_questions=16)
    text = describe_sample(dataset, 0)
    assert marked(text) == "0<|im_end|>1<|im_end|>2<|im_end|>3<|im_end|>"
    assert text.endswith("--- and 12 more questions ---")
    dataset.max_length = 16
    assert re.match("sample 0 cannot be shown: the question .* fills 'data.max_length'", describe_sample(dataset, 0))


def test_questions_are_spread_over_sources_and_types():
    entries = [entry(f"{TAG} {n}", "a", images=(n,), source="many", kind=f"kind {n % 3}") for n in range(300)]
    entries += [entry(f"{TAG} {n}", "a", images=(n,), source="few") for n in range(300, 303)]
    entries += [entry(f"text {n}", "a", images=(), source="text") for n in range(5)]
    chosen = choose_entries(entries, 10, seed=0)
    assert Counter(e.source for e in chosen) == {"many": 4, "few": 3, "text": 3}
    assert len({e.type for e in chosen if e.source == "many"}) == 3
    assert chosen == choose_entries(entries, 10, seed=0)
    assert chosen != choose_entries(entries, 10, seed=1)
    assert choose_entries(entries[:2], 10, seed=0) != []


def test_photos_come_twice_only_where_there_are_too_few():
    entries = [entry(f"{TAG} {n}", "a", images=(n % 4,)) for n in range(40)]
    assert Counter(e.images[0] for e in choose_entries(entries, 4, seed=0)) == {0: 1, 1: 1, 2: 1, 3: 1}
    assert len(choose_entries(entries, 10, seed=0)) == 10
    assert choose_entries([], 10, seed=0) == []


def test_the_page_of_a_real_model(model, records, tmp_path):
    photos, entries = records
    sheet = SampleSheet(tmp_path, entries, [], photos, seed=0)
    sheet.update(model, 0)
    sheet.update(model, 20)
    page = (tmp_path / "samples.html").read_text(encoding="utf-8")
    assert page.count("<article>") == 10
    assert page.count("data:image/jpeg;base64,") == sum(bool(e.images) for e in sheet._entries)
    assert page.index("step 20") < page.index("step 0")
    assert "There is no validation set" in page
    assert not re.search(r"https?:|<script|<link|src=\"(?!data:)", page)
    assert "Say hello." in page
    assert not list(tmp_path.glob("*.tmp"))


def test_all_references_are_shown_and_texts_are_escaped(model, records, tmp_path, reply_with):
    attack = "<script>alert('x')</script>"
    reply_with(lambda question: [attack, " & more"])
    val = [entry(f"{TAG}\nIs <b>it</b> {attack}?", "yes <i>", "yeah", "yes <i>", source='"><img src=x>')]
    SampleSheet(tmp_path, [], val, records[0], seed=0).update(model, 5)
    page = (tmp_path / "samples.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<b>it" not in page
    assert "<img src=x" not in page
    assert "Is &lt;b&gt;it&lt;/b&gt; &lt;script&gt;" in page
    assert "truth: yes &lt;i&gt; / yeah" in page
    assert "&lt;/script&gt; &amp; more" in page
    assert "of the validation set" in page
    assert TAG not in page


def test_right_answers_are_ticked_and_an_empty_one_is_told(model, records, tmp_path, reply_with):
    reply_with(lambda question: ["Red."] if "colour" in question else [])
    val = [entry(f"{TAG}\ncolour?", "red", "crimson"), entry(f"{TAG}\nnumber?", "3", images=(1,))]
    sheet = SampleSheet(tmp_path, [], val, records[0], seed=0)
    sheet.update(model, 5)
    attempts = {sample.question: sample.attempts[5] for sample in sheet.samples}
    assert attempts == {"colour?": Attempt("Red.", right=True), "number?": Attempt("")}
    page = (tmp_path / "samples.html").read_text(encoding="utf-8")
    assert "✓ Red." in page
    assert "(no answer)" in page


def test_answers_are_greedy_and_bounded(model, records, tmp_path, reply_with):
    answerer = reply_with(lambda question: ["x"])
    generate = {"max_new_tokens": 500, "temperature": 1.0, "repetition_penalty": 1.3}
    changed = model.config.model_copy(update={"generate": model.config.generate.model_copy(update=generate)})
    before, model.config = model.config, changed
    SampleSheet(tmp_path, [], [entry("hello", "x", images=())], records[0], seed=0).update(model, 1)
    model.config = before
    assert (answerer.settings.temperature, answerer.settings.max_new_tokens) == (0.0, MAX_NEW_TOKENS)
    assert answerer.settings.repetition_penalty == 1.3


def test_a_bad_photo_and_a_failed_answer_are_told_in_their_place(model, records, tmp_path, reply_with, caplog):
    def reply(question):
        if "memory" in question:
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield "fine"

    reply_with(reply)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    photos = records[0] | {
        90: Photo(90, "broken.jpg", "broken.jpg", tmp_path / "broken.jpg"),
        91: Photo(91, "missing.jpg", "missing.jpg", tmp_path / "missing.jpg"),
    }
    val = [
        entry(f"{TAG}\nbroken?", "x", images=(90,)),
        entry(f"{TAG}\nmissing?", "x", images=(91,)),
        entry(f"{TAG}\nmemory?", "x", images=(1,)),
        entry(f"{TAG}\nfine?", "fine", images=(2,)),
    ]
    sheet = SampleSheet(tmp_path, [], val, photos, seed=0)
    with caplog.at_level(logging.WARNING):
        sheet.update(model, 3)
    attempts = {sample.question: sample.attempts[3] for sample in sheet.samples}
    assert attempts["fine?"] == Attempt("fine", right=True)
    assert attempts["memory?"] == Attempt("OutOfMemoryError: CUDA out of memory", failed=True)
    assert attempts["missing?"].text == f"photo not found: {tmp_path / 'missing.jpg'}"
    assert all(attempts[question].failed for question in ("broken?", "missing?"))
    page = (tmp_path / "samples.html").read_text(encoding="utf-8")
    assert page.count("broken.jpg") == 2  # in place of the photo, and of the answer
    assert page.count("<img") == 2


def test_resuming_keeps_answers_up_to_its_step(model, records, tmp_path, reply_with):
    val = [entry(f"{TAG}\nq{n}", "a", images=(n,)) for n in range(4)]
    reply_with(lambda question: [f"old {question}"])
    first = SampleSheet(tmp_path, [], val, records[0], seed=0)
    for step in (10, 20, 30):
        first.update(model, step)
    val[3] = entry(f"{TAG}\nq3", "another answer", images=(3,))
    reply_with(lambda question: ["new"])
    resumed = SampleSheet(tmp_path, [], val, records[0], seed=0, resumed_step=20)
    resumed.update(model, 30)
    for sample in resumed.samples:
        told = {step: attempt.text for step, attempt in sample.attempts.items()}
        old = {} if sample.question == "q3" else {10: f"old {sample.question}", 20: f"old {sample.question}"}
        assert told == old | {30: "new"}
    assert "old q3" not in (tmp_path / "samples.html").read_text(encoding="utf-8")
    anew = SampleSheet(tmp_path, [], val, records[0], seed=0)
    assert all(not sample.attempts for sample in anew.samples)


@pytest.mark.parametrize("content", [b"", b"[1]", b'[{"key": "a"}]', b'[{"key": "a", "attempts": {"x": 1}}]', b"{}"])
def test_a_broken_record_of_answers_is_no_end(model, records, tmp_path, reply_with, caplog, content):
    reply_with(lambda question: ["new"])
    (tmp_path / "samples.json").write_bytes(content)
    val = [entry("hello", "x", images=())]
    SampleSheet(tmp_path, [], val, records[0], seed=0, resumed_step=5).update(model, 6)
    assert len(json.loads((tmp_path / "samples.json").read_text())) == 1
    assert len(caplog.messages) == (content != b"{}")


def test_a_page_that_cannot_be_written_is_warned_of_once(model, records, tmp_path, reply_with, caplog):
    reply_with(lambda question: ["x"])
    folder = tmp_path / "run"
    folder.mkdir()
    sheet = SampleSheet(folder, [], [entry("hello", "x", images=())], records[0], seed=0)
    shutil.rmtree(folder)
    sheet.update(model, 1)
    sheet.update(model, 2)
    [warning] = caplog.messages
    assert "samples.html cannot be written" in warning


def test_answering_compiles_nothing(workshop, records, tmp_path):
    model = MMultiModal.from_config(tiny_config(workshop)).eval()
    compiled = []
    for layer in model.language_model.model.layers:
        layer.mlp.compile(backend=lambda graph, inputs: compiled.append(graph) or graph.forward, dynamic=True)
    SampleSheet(tmp_path, [], [entry("hello", "x", images=())], records[0], seed=0).update(model, 1)
    assert compiled == []
    model.LLM(torch.tensor([[1, 2, 3]]))
    assert compiled != []


def test_a_model_in_training_mode_is_refused(model, records, tmp_path):
    sheet = SampleSheet(tmp_path, [], [entry("hello", "x", images=())], records[0], seed=0)
    with pytest.raises(AssertionError, match="eval mode"):
        sheet.update(model.train(), 1)


def test_training_is_bit_equal_with_and_without_the_page(workshop, records, tmp_path):
    photos, entries = records
    lora = {"path": str(workshop / "qwen"), "lora": {"r": 4, "alpha": 8, "dropout": 0.3}}
    config = tiny_config(workshop, llm=lora)
    results = []
    for sheet in (None, SampleSheet(tmp_path, entries, [], photos, seed=0)):
        torch.manual_seed(3)
        model = MMultiModal.from_config(config)
        dataset = ImageCaptionDataset(
            photos, entries, model.processor.chat, PixelLoader(model.processor), max_questions=4
        )
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        for step in range(3):
            model.train()
            model.loss(collate([dataset[step]])).backward()
            optimizer.step()
            optimizer.zero_grad()
            if sheet is not None:
                sheet.update(model.eval(), step + 1)
        results.append([*(parameter.detach() for parameter in trained), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def browsers():
    return any(map(shutil.which, screenshots.BROWSERS))


@pytest.mark.skipif(not browsers(), reason="no Chromium on this machine")
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_the_page_in_a_browser(model, records, tmp_path, reply_with, width, scheme):
    pytest.importorskip("playwright.sync_api")
    photos = dict(records[0])
    Image.new("RGB", (4000, 300), "red").save(tmp_path / "wide.png")
    photos[0] = Photo(0, "wide.png", "wide.png", tmp_path / "wide.png")
    attack = "<script>alert('x')</script>"
    reply_with(lambda question: ["很长" * 200 if "long" in question else attack + "x" * 300])
    val = [entry(f"{TAG}\nlong {attack}?", "a" * 200, images=(0,)), entry("hello", "hi", images=())]
    sheet = SampleSheet(tmp_path, [], val, photos, seed=0)
    for step in range(10, 90, 10):
        sheet.update(model, step)
    with screenshots.running_browser() as browser:
        page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
        requests, dialogs = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        page.goto((tmp_path / "samples.html").as_uri())
        assert page.locator("article").count() == 2
        assert page.evaluate("document.images[0].naturalWidth") == 480
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert attack in page.locator("article").first.inner_text() + page.locator("article").last.inner_text()
        assert page.locator("article").first.locator("> table tr").count() == 5
        assert not page.get_by_text("step 10").first.is_visible()
        page.get_by_text("3 earlier").first.click()
        assert page.get_by_text("step 10").first.is_visible()
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == {"dark": "rgb(17, 24, 39)", "light": "rgb(255, 255, 255)"}[scheme]
    assert dialogs == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []


def test_a_page_without_answers_yet_is_whole():
    page = render_page("运行", [], held_out=True)
    assert page.startswith("<!DOCTYPE html>")
    assert "<h1>运行</h1>" in page
