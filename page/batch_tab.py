"""The batch tab of the page: many photos or a file of questions in, a table and two files out."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from errors import is_defect
from page.asking import PRIVATE, Shared, Work, decoding, sentence_of, system_text, until_turn
from page.batch import Row, answer_rows, as_csv, as_jsonl, as_table, read_rows
from page.chat import UploadedPhoto, checked
from page.settings import as_settings
from page.texts import as_markdown, label, language_of, say
from page.uploads import BATCH, store


class BatchTab:
    """Components and handlers; made inside `gr.Blocks`."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        gr.Markdown(label("batch_info"))
        self.files = gr.File(
            file_count="multiple", file_types=["image", ".jsonl"], label=label("batch_files"), elem_id="batch-files",
            height=160,
        )  # fmt: skip
        folder = gr.Button(label("batch_folder"), size="sm", elem_id="batch-folder")
        folder.click(None, js="() => vqa.choose_folder()")
        self.question = gr.Textbox("", label=label("batch_question"), lines=1, elem_id="batch-question")
        with gr.Row():
            self.run = gr.Button(label("batch_run"), variant="primary", min_width=80, elem_id="batch-run")
            self.cancel = gr.Button(label("cancel"), interactive=False, min_width=80, elem_id="batch-cancel")
        self.state = gr.Markdown("", elem_id="batch-state")
        self.table = gr.Dataframe(
            headers=["photo", "question", "answer"], datatype="str", interactive=False, wrap=True,
            label=label("batch_table"), visible=False, elem_id="batch-table",
        )  # fmt: skip
        with gr.Row():
            self.downloads = [
                gr.DownloadButton(name, visible=False, size="sm", elem_id=f"batch-{name}") for name in ("csv", "jsonl")
            ]

    def connect(self, checkpoint: Any, settings: list[Any]) -> None:
        outputs = [self.state, self.table, self.run, self.cancel, *self.downloads]
        self.run.click(self.on_run, [self.files, self.question, checkpoint, *settings], outputs, **PRIVATE)
        self.cancel.click(self.on_cancel, None, None, **PRIVATE)

    def on_cancel(self, request: gr.Request) -> None:
        self._shared.stop(request.session_hash or "")

    def on_run(self, request: gr.Request, files, question, name, *settings) -> Iterator[list[Any]]:
        language, session = language_of(request), request.session_hash or ""
        with self._shared.work(session) as work:
            if work is None:
                yield self._show(say(language, "busy"), [], language)
                return
            done, photos = [], []
            try:
                uploads = [checked(upload, self._shared.folder) for upload in files or []]
                paths = [upload.path for upload in uploads]
                self._shared.files.hold(session + BATCH, *paths)
                self._shared.files.release(session + BATCH, keep=paths)  # the answers before
                tables = [upload for upload in uploads if upload.name.lower().endswith(".jsonl")]
                photos = [upload for upload in uploads if upload not in tables]
                rows = read_rows(photos, tables, question.strip() if isinstance(question, str) else "")
                if not rows:
                    yield self._show(say(language, "no_rows"), [], language)
                    return
                values = as_settings(settings)
                for sentence, answered in self._answered(work, rows, photos, str(name), values, language):
                    done += answered
                    yield self._show(sentence, done, language, busy=True)
                failed = sum("error" in row for row in done)
                ends = [say(language, "batch_state", done=len(done) - failed, all=len(rows))]
                ends += [say(language, "batch_failed", failed=failed)] if failed else []
                ends += [say(language, "stopped")] if work.stopped else []
                yield self._show(" · ".join(ends), done, language, files=self._stored(session, done))
            except Exception as error:
                sentence = sentence_of(error, photos, language)
                yield self._show(sentence, done, language, files=self._stored(session, done))
                if is_defect(error):
                    raise

    def _answered(
        self, work: Work, rows: list[Row], photos: list[UploadedPhoto], name: str, values: dict[str, Any], language: str
    ) -> Iterator[tuple[str, list[Row]]]:
        """Yield what to say, and the rows that are answered since."""
        settings, system = decoding(self._shared.generate, values), system_text(values["system"])
        with self._shared.line.place() as place:
            for sentence in until_turn(self._shared, place, work, language, name):
                yield sentence, []
            if work.stopped:
                return
            (engine,) = self._shared.engines.get(name)
            count = 0
            yield say(language, "batch_state", done=0, all=len(rows)), []
            for batch in answer_rows(engine, rows, photos, settings, system):
                count += len(batch)
                yield say(language, "batch_state", done=count, all=len(rows)), batch
                if work.stopped:
                    return

    def _stored(self, session: str, rows: list[Row]) -> list[str]:
        """Write both files of the answers; return their paths."""
        if not rows:
            return []
        contents = {"answers.csv": as_csv(rows), "answers.jsonl": as_jsonl(rows)}
        paths = [store(self._shared.folder, content, name) for name, content in contents.items()]
        self._shared.files.hold(session + BATCH, *paths)
        return paths

    def _show(
        self, sentence: str, rows: list[Row], language: str, busy: bool = False, files: list[str] | None = None
    ) -> list[Any]:
        headers = [say(language, key) for key in ("batch_photo", "batch_asked", "batch_answer")]
        table = gr.update(value=as_table(rows), headers=headers, visible=bool(rows))
        downloads = [gr.update(value=path, visible=True) for path in files or []] or [gr.update(visible=False)] * 2
        return [as_markdown(sentence), table, gr.update(interactive=not busy), gr.update(interactive=busy), *downloads]
