"""The page itself, of Gradio: its components, and which of the studio's answers each event has."""

import os
from typing import Any

from surgery.errors import InputError
from surgery.guidance.methods import METHODS
from surgery.models.anatomy import attention_sites
from surgery.models.patching import denoisers
from surgery.models.selection import GROUPS
from surgery.nn.operators import OPERATIONS, UNITS

from . import shown
from .answers import Answers
from .ballot import PLACES, SAME
from .screen import MOST_IMAGES, MOST_SETTINGS, NONE, NUMBERS, first_values, guidance_text, sliders_of, slots_of

_PRIVATE = {"api_visibility": "private"}
_QUICK = {"queue": False, "show_progress": "hidden", **_PRIVATE}
# The session lets one after the other draw. What a field holds is checked with the recipe alone, in its words, which
# Gradio's own checks would come before.
_DRAWS = {"concurrency_limit": None, "show_progress": "hidden", "preprocess": False}
_FORGOTTEN = (3600, 86400)  # seconds between two looks at the files that were shown, and until one goes
CSS = """
.told {padding: 4px 0; min-height: 24px; white-space: pre-wrap}
.told.problem {color: #b3261e; font-weight: 600}
.told progress {width: 40%; vertical-align: middle}
"""


def import_gradio() -> Any:
    """Gradio, told to send nothing to anybody; InputError where it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # pyright: ignore[reportMissingImports]  an extra
    except ImportError as error:
        raise InputError("the studio needs gradio: pip install 'pladis-surgery[ui]'") from error
    return gradio


class Page:
    """The components of one model's page; `blocks` is what Gradio launches.

    gpu: a decorator of the functions that draw, ZeroGPU's.
    """

    def __init__(self, answers: Answers, gpu: Any = None) -> None:
        self._gr, self._answers, self._gpu = import_gradio(), answers, gpu or (lambda function: function)
        self._opened = answers.opened
        self._fields: dict[str, Any] = {}  # {field of the screen: its component}
        self._shown: dict[str, Any] = {}  # {output of an answer: its component}
        self._live: list[Any] = []  # (event on which both sides are drawn again, its settings)
        self.blocks = self._built()

    def _built(self):
        gr = self._gr
        with gr.Blocks(
            title=f"surgery studio: {self._opened.name}", analytics_enabled=False, delete_cache=_FORGOTTEN
        ) as blocks:
            gr.Markdown(f"## {_plain(self._opened.name)}")
            with gr.Row():
                with gr.Column(scale=2, min_width=340):
                    self._settings(first_values(self._opened))
                with gr.Column(scale=3, min_width=420):
                    with gr.Row():
                        draw = gr.Button("Draw", variant="primary", elem_id="draw")
                        stop = gr.Button("Stop", elem_id="stop")
                        live = gr.Checkbox(True, label="draw again when a setting changes", elem_id="live")
                    self._shown["status"] = gr.HTML(shown.note("write a prompt and draw"), elem_id="status")
                    with gr.Tab("Compare"):
                        self._compare()
                    with gr.Tab("Attention"):
                        self._attention()
                    if self._answers.ballot:
                        with gr.Tab("Blind"):
                            self._blind()
                    with gr.Tab("Recipe"):
                        self._recipe()
                    if self._opened.scores:
                        with gr.Tab("Scores"):
                            self._scores(self._opened.scores)
            self._drawing(draw, stop, live)
        return blocks

    def _settings(self, values):
        gr = self._gr
        self._field("prompt", gr.Textbox(label="prompt", lines=2, elem_id="prompt", placeholder="what to draw"))
        self._field(
            "negative_prompt", gr.Textbox(values["negative_prompt"], label="negative prompt", elem_id="negative")
        )
        with gr.Row():
            self._field("seed", gr.Number(values["seed"], label="first seed", precision=0, elem_id="seed"))
            images = gr.Slider(1, MOST_IMAGES, values["images"], step=1, label="images", elem_id="images")
            self._field("images", images)
        with gr.Row():
            for name in NUMBERS:
                label = name.replace("_", " ")
                self._field(name, gr.Number(values[name], label=label, elem_id=name, min_width=90))
        for slot in range(slots_of(self._opened)):
            self._operation(slot, values)
        with gr.Accordion("guidance", open=values["method"] != NONE):
            method = gr.Dropdown([NONE, *METHODS], value=values["method"], label="method", elem_id="method")
            label = "its settings, NAME: VALUE, a line each"
            text = gr.Textbox(values["guidance"], label=label, lines=2, max_lines=12, elem_id="guidance")
            self._field("method", method)
            self._field("guidance", text)
            changed = method.input(guidance_text, method, text, **_QUICK)
            self._live += [(changed.then, {}), (text.blur, {})]
        with gr.Accordion("regions, for the operation of that name", open=False):
            label = "LEFT,TOP,RIGHT,BOTTOM=PROMPT, parts of 1, a line each"
            self._field("regions", gr.Textbox(label=label, lines=2, elem_id="regions"))

    def _field(self, name, component):
        self._fields[name] = component

    def _operation(self, slot, values):
        gr = self._gr
        operator = values[f"operator.{slot}"]
        setting = self._opened.operations[slot]["with"] if slot < len(self._opened.operations) else {}
        with gr.Accordion(f"operation {slot + 1}", open=slot == 0 or operator != NONE):
            chosen = gr.Dropdown([NONE, *OPERATIONS], value=operator, label="operator", elem_id=f"operator-{slot}")
            layers = gr.Dropdown(
                ["all", *self._layers()],
                value=values[f"layers.{slot}"],
                multiselect=True,
                allow_custom_value=True,
                label="layers: groups, paths, or patterns as *.attn2",
                elem_id=f"layers-{slot}",
            )
            sliders = [gr.Slider(**one) for one in _slider_settings(operator, setting, slot)]
            unit = gr.Dropdown(
                list(UNITS), value=values[f"unit.{slot}"], label="unit", visible=_projects(operator), interactive=True
            )
            more = gr.Textbox(
                values[f"more.{slot}"],
                label="more of it, as in a recipe: with, schedule, blocks",
                placeholder="schedule: {fraction: [0, 0.8]}",
                lines=1,
                max_lines=6,
                elem_id=f"more-{slot}",
            )
        self._field(f"operator.{slot}", chosen)
        self._field(f"layers.{slot}", layers)
        for place, slider in enumerate(sliders):
            self._field(f"value.{slot}.{place}", slider)
        self._field(f"unit.{slot}", unit)
        self._field(f"more.{slot}", more)

        def fit(name):
            updates = [gr.update(**one) for one in _slider_settings(name, {}, slot)]
            return [*updates, gr.update(visible=_projects(name))]

        changed = chosen.input(fit, chosen, [*sliders, unit], **_QUICK)
        newest = {"trigger_mode": "always_last"}
        self._live += [(changed.then, {}), (layers.input, newest), (unit.input, newest), (more.blur, newest)]
        self._live += [(slider.release, newest) for slider in sliders]

    def _layers(self):
        sites = [site for site in attention_sites(denoisers(self._opened.pipeline)) if site.kind in ("cross", "joint")]
        blocks = [group for group in GROUPS if any(site.block == group for site in sites)]
        return [*blocks, *(site.path for site in sites if not site.refusal)]

    def _compare(self):
        with self._gr.Row():
            for side in ("base", "patched"):
                self._shown[side] = self._gallery(side, side)

    def _gallery(self, label, name):
        shape = {"columns": 2, "object_fit": "contain", "height": "auto"}
        buttons = ["download", "fullscreen"]
        return self._gr.Gallery(label=label, elem_id=name, interactive=False, format="png", buttons=buttons, **shape)

    def _attention(self):
        gr = self._gr
        gr.Markdown(
            "Choose a word of the prompt: which places of the first seed's image attend to it, dense, sparse and by "
            "the operators of the page. These runs are guided by CFG alone."
        )
        word = gr.Radio([], label="word", elem_id="word")
        self._shown["map"] = gr.Image(
            show_label=False, elem_id="map", interactive=False, format="png", buttons=["download", "fullscreen"]
        )
        prompt = self._fields["prompt"]
        prompt.change(lambda text: gr.update(choices=shown.words_in(text), value=None), prompt, word, **_QUICK)
        self._answered(
            word.input,
            lambda page, values, word: self._answers.word(page, word, values),
            ("status", "map"),
            [word],
            api_name="attention",
        )

    def _recipe(self):
        gr = self._gr
        gr.Markdown("What is on the screen; `surgery plan` and `surgery apply` take it as a file.")
        self._shown["recipe"] = gr.Code(
            "", language="yaml", label="recipe.yaml", interactive=False, elem_id="recipe", buttons=["copy", "download"]
        )
        with gr.Row():
            show = gr.Button("Show", elem_id="show-recipe")
            save = gr.Button("Save", elem_id="save-recipe", visible=self._answers.saves is not None)
        outputs = ("status", "recipe")
        self._answered(show.click, lambda page, values: [self._answers.recipe(values)], outputs, api_name="recipe")
        if self._answers.saves is not None:
            self._answered(save.click, lambda page, values: [self._answers.save(values)], outputs, **_PRIVATE)

    def _scores(self, scores):
        headers = ["metric", "base", "patched", "difference", "95% interval", "verdict"]
        of = ", ".join(f"{part.count} of {part.name}" for part in scores.prompts)
        self._gr.Markdown(f"Of the artifact as it was scored, on {_plain(of)}; not of what the sliders say now.")
        self._gr.Dataframe(shown.score_rows(scores), headers=headers, interactive=False, elem_id="scores")

    def _blind(self):
        gr, answers = self._gr, self._answers
        gr.Markdown(
            "Two images of one prompt and seed, one of the base and one by the page's settings, in an order that "
            "chance decides. Votes go to the files of `surgery study`."
        )
        label = "prompts, a line each, in turn; the page's own where there is none"
        prompts = gr.Textbox(label=label, lines=2, elem_id="prompts")
        rater = gr.Textbox(label="your name, if you like", elem_id="rater")
        begin = gr.Button("Next pair", elem_id="next-pair")
        self._shown["asked"] = gr.Textbox(label="prompt", interactive=False, elem_id="asked")
        self._shown["shown"] = self._gallery("left and right", "pair")
        choices = [*PLACES, SAME]
        quality = gr.Radio(choices, label="Which has the better image quality?", elem_id="quality")
        alignment = gr.Radio(choices, label="Which follows the prompt more closely?", elem_id="alignment")
        vote = gr.Button("Vote", variant="primary", elem_id="vote")
        result = gr.Button("What do the votes say? (this ends the blindness)", elem_id="result")
        self._shown["result"] = gr.Textbox(label="result", lines=8, elem_id="counted", buttons=["copy"])
        self._shown |= {"quality": quality, "alignment": alignment}
        fresh = ("status", "shown", "asked", "quality", "alignment")
        self._answered(
            begin.click,
            lambda page, values, prompts: answers.next_pair(page, prompts, values),
            fresh,
            [prompts],
            **_PRIVATE,
        )
        self._answered(
            vote.click,
            lambda page, values, rater, prompts, quality, alignment: answers.vote(
                page, rater, {"quality": quality, "alignment": alignment}, prompts, values
            ),
            fresh,
            [rater, prompts, quality, alignment],
            **_PRIVATE,
        )
        counted = self._listed(lambda: [answers.result()], ("status", "result"))
        result.click(counted, None, self._of("status", "result"), **_PRIVATE)

    def _drawing(self, draw, stop, live):
        answers, outputs = self._answers, ("status", "base", "patched", "recipe")
        starts = [draw.click, self._fields["prompt"].submit]
        drawing = {"api_name": "draw"}
        for event in starts:
            self._answered(event, answers.draw, outputs, **drawing)
            drawing = _PRIVATE
        for event, settings in self._live:
            self._answered(
                event,
                lambda page, values, live: answers.redraw(page, live, values),
                outputs,
                [live],
                **_PRIVATE,
                **settings,
            )

        def stopped(page):
            yield answers.stop(page)

        stop.click(self._with_page(stopped), None, None, **_QUICK)

    def _answered(self, event, answer, outputs, more=(), **settings):
        """Have an event answered: `answer(page, the screen's values, *what `more` holds)` gives the answers."""
        names = list(self._fields)

        def answered(page, *values):
            return answer(page, dict(zip(names, values, strict=False)), *values[len(names) :])

        function = self._with_page(self._gpu(self._listed(answered, outputs)))
        event(function, [*self._fields.values(), *more], self._of(*outputs), **_DRAWS, **settings)

    def _of(self, *names):
        return [self._shown[name] for name in names]

    def _listed(self, answers, outputs):
        """The function that gives each answer as a list, as Gradio has it."""
        skip = self._gr.skip()

        def listed(*given):
            for answer in answers(*given):
                yield [answer.get(name, skip) for name in outputs]

        return listed

    def _with_page(self, function):
        """The generator function with the name of the page that asks before what Gradio hands it."""

        def asked(request, *values):
            yield from function(request.session_hash or "", *values)

        asked.__annotations__ = {"request": self._gr.Request}  # by which Gradio knows that it wants one
        return asked


def _slider_settings(operator, setting, slot):
    """Of each slider of an operation what it is to show; those that it has no use for are hidden."""
    sliders = sliders_of(operator, setting)
    found = []
    for place in range(MOST_SETTINGS):
        own = {"elem_id": f"value-{slot}-{place}", "interactive": True}
        if place < len(sliders):
            one = sliders[place]
            own |= {"label": one.name, "info": one.meaning, "step": one.step, "visible": True}
            found.append({**own, "minimum": one.low, "maximum": one.high, "value": one.value})
        else:
            found.append({**own, "label": "-", "minimum": 0, "maximum": 1, "value": 0, "visible": False})
    return found


def _projects(operator):
    return operator in OPERATIONS and OPERATIONS[operator].projects


def _plain(text):
    """Text in which Markdown and HTML mean nothing."""
    return "".join(f"\\{character}" if character in "\\`*_{}[]()#+-.!|<>~$&" else character for character in text)
