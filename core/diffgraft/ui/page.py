"""The page: Gradio's components around `Playground`. No script of our own, nothing from a network, no file but what it makes itself."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from html import escape
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

from diffgraft.installed import registry
from diffgraft.installed.errors import ConfigError, DiffgraftError
from diffgraft.installed.foreign import brief, plain, said
from diffgraft.methods.extras import imported
from diffgraft.ui.access import Access
from diffgraft.ui.controls import LONGEST, Control, controls_of, typed
from diffgraft.ui.looks import CSS, FONTS, MONO, note, outcome_html, progress_html, verdict_html
from diffgraft.ui.running import Outcome, Playground, Progress, ensure_in_range, thumbnail
from diffgraft.ui.stacks import Asked, as_command, as_python, as_yaml, judge, menu, moved, pipeline_class, specs_of

gr: Any = imported("gradio", "`diffgraft ui`")

Shown = dict[str, dict[str, Any]]
"""What the page shows of each plugin's knobs, where somebody turned them."""
AT_ONCE = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Of what takes no time: it does not wait for a run."""
REMEMBERED = 24
"""Runs that a visitor's page keeps."""


def problem(error: Exception) -> Any:
    """An error as Gradio shows it. It reads HTML, which somebody's text must not be."""
    text = f"{type(error).__name__}: {plain(error)}" if isinstance(error, DiffgraftError) else said(error)
    return gr.Error(escape(text), title="This does not run", duration=None, print_exception=False)


def asked_of(access: Access, pipeline: Any, prompt: Any, steps: Any, guidance: Any, seed: Any, names: Sequence[str], shown: Shown) -> Asked:
    """What the fields of the page say.

    Raises:
        DiffgraftError: something that cannot be.
    """
    text = prompt if isinstance(prompt, str) else ""
    if len(text) > LONGEST:
        raise ConfigError(f"the prompt has {len(text)} characters; at most {LONGEST}")
    count = number("steps", steps)
    for name, value in (("steps", count), ("seed", seed)):
        if value is not None and (not math.isfinite(value) or value != int(value)):
            raise ConfigError(f"{name} = {value}: it must be a whole number")
    asked = Asked(
        pipeline=access.pipeline(pipeline),
        prompt=text,
        steps=None if count is None else int(count),
        guidance_scale=number("guidance scale", guidance),
        seed=int(seed or 0),
        specs=specs_of(names or [], shown, access),
    )
    return ensure_in_range(asked)


def number(name: str, text: Any) -> float | None:
    """A number that was typed; None where nothing was.

    Raises:
        ConfigError: it is none.
    """
    try:
        return float(text) if str("" if text is None else text).strip() else None
    except (TypeError, ValueError):
        raise ConfigError(f"{name} = {brief(text)}: a number, or empty for the pipeline's own") from None


def defaults_of(access: Access, pipeline: Any) -> tuple[str, int | None, float | None]:
    """(prompt, steps, guidance scale) to begin with."""
    bundled = registry.bundled_of(access.pipeline(pipeline))
    return ("", None, None) if bundled is None else (next(iter(bundled.prompts), ""), bundled.steps, bundled.guidance_scale)


def field(knob: Control, value: Any, access: Access, place: str) -> Any:
    """A knob as a component."""
    said = {"label": knob.name, "info": knob.description, "interactive": True, "elem_id": f"knob-{place}"}
    empty = {"placeholder": f"{knob.allowed} (nothing: {'none' if knob.default is None else typed(knob.default)})"}
    match knob.kind:
        case "switch":
            return gr.Checkbox(value=bool(value), **said)
        case "slider":
            return gr.Slider(knob.low, knob.high, value=knob.low if value is None else value, step=knob.step, **said)
        case "number":
            said["info"] = f"{knob.description} ({knob.allowed})"
            return gr.Number(value=value, precision=0 if knob.whole else None, **said)  # of its range the verdict tells
        case "choice":
            return gr.Dropdown([*knob.choices, *([("none", "")] if knob.optional else [])], value="" if value is None else value, **said)
        case "pipeline" | "file":
            choices = access.offered if knob.kind == "pipeline" else access.files()
            return gr.Dropdown([("none", ""), *choices], value=value or "", allow_custom_value=access.hub, **said)
        case "text":
            return gr.Textbox(value=typed(value), max_length=LONGEST, **empty, **said)
    return gr.Textbox(value="", placeholder="an object: set it in Python", **{**said, "interactive": False})


class Page:
    """The components of one page and what they do. Of a visitor's own are only the ``gr.State``s."""

    def __init__(self, ground: Playground, first: str) -> None:
        self.ground = ground
        self.access = ground.access
        with gr.Blocks(title="diffgraft", analytics_enabled=False, delete_cache=(600, 3600)) as self.blocks:
            gr.HTML("<h1>diffgraft</h1><p>Put papers on a pipeline, and see what each of them buys and costs.</p>", elem_id="head")
            self.shown, self.renewed = gr.State({}), gr.Number(0, visible="hidden")
            self.runs, self.current = gr.State([]), gr.State(None)
            with gr.Row():
                with gr.Column(scale=5, min_width=300):
                    self.lay_out_stack(first)
                with gr.Column(scale=6, min_width=300):
                    self.lay_out_run()
            self.wire()

    # what there is ----------------------------------------------------------------------------------------------------------------------

    def lay_out_stack(self, first: str) -> None:
        """What is asked for: the pipeline, the call, and the stack with its knobs."""
        prompt, steps, guidance = defaults_of(self.access, first)
        self.pipeline = gr.Dropdown(
            self.access.offered,
            value=first,
            label="Pipeline",
            info="bundled, or named where this was started" + (", or a Hub id owner/name" if self.access.hub else ""),
            allow_custom_value=self.access.hub,
            elem_id="pipeline",
        )
        info = "or the class, where it draws classes"
        self.prompt = gr.Textbox(prompt, label="Prompt", info=info, lines=2, max_length=LONGEST, elem_id="prompt")
        with gr.Row():
            looks = {"placeholder": "its own", "max_lines": 1, "max_length": 40, "min_width": 80}  # a field of numbers cannot be empty
            self.steps = gr.Textbox(typed(steps), label="Steps", elem_id="steps", **looks)
            self.guidance = gr.Textbox(typed(guidance), label="Guidance", elem_id="guidance", **looks)
            self.seed = gr.Number(0, label="Seed", precision=0, min_width=80, elem_id="seed")
        info = "the stack, the first outermost; type to search by name or by what it does"
        self.picked = gr.Dropdown(menu(), value=[], multiselect=True, label="Plugins", info=info, elem_id="plugins")
        self.verdict = gr.HTML(elem_id="verdict")
        again = [self.picked.change, self.renewed.change]
        gr.render(inputs=[self.picked, self.shown], triggers=again, show_progress="hidden")(self.lay_out_cards)

    def lay_out_cards(self, order: list[str], shown: Shown) -> None:
        """A card for each plugin of the stack."""
        for place, name in enumerate(order or []):
            try:
                knobs = controls_of(registry.find(name))
            except DiffgraftError:  # the verdict says why
                continue
            with gr.Group(elem_classes=["card", f"card-{name}"]):
                with gr.Row(elem_classes="card-head"):
                    gr.Markdown(f"**{place + 1}. {name}**")
                    for sign, words, new in (("▲", "out", moved(order, name, -1)), ("▼", "in", moved(order, name, 1)), ("✕", "off", None)):
                        stack = [each for each in order if each != name] if new is None else new
                        button = gr.Button(sign, size="sm", elem_id=f"{words}-{name}", interactive=stack != order)
                        button.click(partial(list, stack), None, self.picked, **AT_ONCE)
                with gr.Accordion(f"{len(knobs)} knobs" if knobs else "no knobs", open=len(order) < 3):
                    for knob in knobs:
                        made = field(knob, shown.get(name, {}).get(knob.name, knob.default), self.access, f"{name}-{knob.name}")
                        if knob.kind != "fixed":
                            change = made.change(partial(turned, name, knob.name), [made, self.shown], self.shown, **AT_ONCE)
                            change.then(self.look, self.asks, self.judged, trigger_mode="always_last", **AT_ONCE)

    def lay_out_run(self) -> None:
        """What comes of it."""
        with gr.Row():
            self.run = gr.Button("Run", variant="primary", elem_id="run")
            self.stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop", min_width=80, scale=0)
        self.count = gr.Checkbox(True, label="Count multiply-adds too (a further run of each)", container=False, elem_id="count")
        self.state = gr.HTML(elem_id="state")
        looks = {"show_label": False, "interactive": False}
        self.slider = gr.ImageSlider(label="Baseline and stack", type="pil", format="png", max_height=520, elem_id="slider", **looks)
        self.figures = gr.HTML(elem_id="figures")
        with gr.Tabs():
            made = {}
            for title, language in (("Python", "python"), ("YAML", "yaml"), ("Command", "shell"), ("Report", None)):
                with gr.Tab(title):
                    made[title] = gr.Code(
                        language=language, wrap_lines=True, show_line_numbers=False, buttons=["copy"], elem_id=title.lower(), **looks
                    )
        self.written = [made["Python"], made["YAML"], made["Command"]]
        self.line, self.report = made["Python"], made["Report"]
        self.past = gr.Gallery(
            label="Runs",
            columns=4,
            fit_columns=False,
            height="auto",
            allow_preview=False,
            interactive=False,
            object_fit="contain",
            elem_id="runs",
            buttons=[],
        )
        self.again = gr.Button("Use these settings again", interactive=False, size="sm", elem_id="again")

    def wire(self) -> None:
        """Which of them does what."""
        call = [self.prompt, self.steps, self.guidance]
        fields = [self.pipeline, *call, self.seed, self.picked]
        self.asks, self.judged = [*fields, self.shown], [self.verdict, self.run, *self.written]
        found = [self.slider, self.figures, self.report, self.current, self.again]
        self.pipeline.input(self.settle, self.pipeline, call, **AT_ONCE)
        looks = [each.change for each in (*fields, self.renewed)]
        gr.on([*looks, self.blocks.load], self.look, self.asks, self.judged, trigger_mode="always_last", **AT_ONCE)
        running = self.run.click(
            self.go,
            [self.count, self.runs, *self.asks],
            [self.state, self.stop, self.line, self.runs, self.past, *found],
            concurrency_limit=1,
            concurrency_id="run",
            trigger_mode="once",
            show_progress="hidden",
            api_visibility="private",
        )
        running.then(lambda: gr.update(interactive=False), None, self.stop, **AT_ONCE)
        running.failure(lambda: "", None, self.state, **AT_ONCE)
        stopped = "<p>stopped: nothing of this run is kept</p>", gr.update(interactive=False), None
        self.stop.click(lambda: stopped, None, [self.state, self.stop, self.slider], cancels=[running], **AT_ONCE)
        self.past.select(self.recall, self.runs, [*self.written, *found], **AT_ONCE)
        settings = [self.pipeline, *call, self.seed, self.picked, self.shown, self.renewed]
        self.again.click(self.reuse, [self.current, self.renewed], settings, **AT_ONCE)

    # what it does -----------------------------------------------------------------------------------------------------------------------

    def settle(self, name: Any) -> tuple[Any, ...]:
        """The call's fields as another pipeline begins with them."""
        try:
            prompt, steps, guidance = defaults_of(self.access, name)
        except DiffgraftError:  # `look` says it
            return "", "", ""
        return prompt, typed(steps), typed(guidance)

    def look(self, *fields: Any) -> tuple[Any, ...]:
        """What speaks against the stack, whether it runs, and how it is written."""
        order, shown = fields[-2] or [], fields[-1]
        try:
            verdict = judge(order, shown, self.access, pipeline_class(self.access.pipeline(fields[0])))
            texts = written(asked_of(self.access, *fields)) if verdict.runs else ("", "", "")
        except DiffgraftError as error:
            return note(str(error), "bad"), gr.update(interactive=False), "", "", ""
        return verdict_html(verdict, len(order)), gr.update(interactive=verdict.runs), *texts

    def go(self, count: bool, kept: list[Outcome], *fields: Any) -> Iterator[tuple[Any, ...]]:
        """One run, told as it goes: (state, stop, line, runs, their pictures, slider, figures, report, the run, again)."""
        hold, left = gr.skip(), None
        try:
            asked = asked_of(self.access, *fields)
            yield progress_html(Progress("loading")), gr.update(interactive=True), *[hold] * 4, "", "", hold, hold
            for item in self.ground.run(asked, bool(count)):
                if isinstance(item, Progress):
                    left = item.picture if item.phase == "baseline" and item.picture else left
                    pictures = hold if item.picture is None else (left or item.picture, item.picture)
                    yield progress_html(item), *[hold] * 4, pictures, *[hold] * 4
                    continue
                kept = [item, *(run for run in kept if run.asked is not item.asked)][:REMEMBERED]
                state = progress_html(Progress("counting")) if count and not item.macs else ""
                yield state, hold, as_python(item.asked, item.takes), kept, gallery(kept), *found_in(item)
        except Exception as error:
            raise problem(error) from None

    def recall(self, kept: list[Outcome], event: gr.SelectData) -> tuple[Any, ...]:
        """A run of before."""
        run = kept[event.index]
        return *written(run.asked, run.takes), *found_in(run)

    def reuse(self, run: Outcome, count: int) -> tuple[Any, ...]:
        """The settings of the run that is shown."""
        asked = run.asked
        names, shown = [name for name, _ in asked.specs], {name: dict(knobs) for name, knobs in asked.specs}
        call = asked.prompt, typed(asked.steps), typed(asked.guidance_scale)
        return asked.pipeline, *call, asked.seed, names, shown, count + 1


def turned(plugin: str, knob: str, value: Any, shown: Shown) -> Shown:
    """What the page shows after somebody turned a knob."""
    return {**shown, plugin: {**shown.get(plugin, {}), knob: value}}


def written(asked: Asked, takes: Mapping[str, Any] | None = None) -> tuple[str, str, str]:
    """What is to be copied."""
    return as_python(asked, takes), as_yaml(asked), as_command(asked)


def found_in(run: Outcome) -> tuple[Any, ...]:
    """(slider, figures, report, the run, again)."""
    return run.pictures, outcome_html(run), run.report, run, gr.update(interactive=True)


def gallery(kept: Sequence[Outcome]) -> list[tuple[Any, str]]:
    """The runs as small pictures with their figures."""
    told = ("speed-up", "PSNR to the baseline")
    return [
        (thumbnail(run.pictures[1]), ", ".join([plain(run.asked.title), *(b for what, _, b in run.facts() if what in told)]))
        for run in kept
    ]


def serve(ground: Playground, first: str, host: str, port: int, folder: str) -> tuple[Any, str]:
    """Serve the page in threads of its own; gives (the page, its address). Pictures lie in ``folder``, and nothing else can be read."""
    os.environ["GRADIO_TEMP_DIR"] = folder
    page = Page(ground, first).blocks
    page.queue(max_size=64, default_concurrency_limit=1, api_open=False)
    theme = gr.themes.Soft(primary_hue="indigo", neutral_hue="slate", font=FONTS, font_mono=MONO)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        show_error=True,
        inbrowser=False,
        footer_links=[],
        allowed_paths=[],
        max_file_size=1,
        enable_monitoring=False,
        state_session_capacity=100,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        head=f"<style>{CSS}</style>",  # what `css` says would be held to what is inside the page
    )
    return page, address
