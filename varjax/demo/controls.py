"""Makes the controls of models, classes and sampling options, and reads them back, or a link."""

import argparse
import dataclasses
import typing
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]
import numpy as np

from varjax.cli.captions import class_titles
from varjax.demo.drawing import DemoModel, Drawing, flag_text
from varjax.errors import InputError, check_setting
from varjax.sampling.sampler import parse_option

FIRST_CLASSES = 4


class OptionControls:
    """Makes the controls of one model: a choice of classes, and one control for each option.

    The range, step and help of a control come from the field of the options, as those of a flag do.

    Attributes:
        model: model that the controls belong to.
        components: Gradio's components: the classes first, then the options.
    """

    def __init__(self, model: DemoModel, classes: Sequence[int] | None):
        """Makes the components.

        Args:
            model: model that the controls belong to.
            classes: classes that are chosen at first; None for options alone.
        """
        self.model = model
        self._has_classes = classes is not None
        self.components: list[Any] = [] if classes is None else [class_control(model, classes)]
        options = model.sampler.options()
        self._hints = typing.get_type_hints(type(options))
        self._fields = sorted(
            dataclasses.fields(options), key=lambda field: field.metadata["slider"] is None
        )
        with gr.Accordion("Options", open=False):
            for field in self._fields:
                self.components.append(_control(field, getattr(options, field.name)))

    @property
    def names(self) -> list[str]:
        """Returns the names of the options, in the order of their components."""
        return [field.name for field in self._fields]

    def read(self, values: Sequence[Any]) -> tuple[list[int], dict[str, Any]]:
        """Returns the classes and the options by name from the values of the components.

        Raises InputError for text that is no value of an option.
        """
        labels = values[0] if self._has_classes else []
        given = zip(self.names, values[self._has_classes :], strict=True)
        return labels or [], {name: self._option(name, value) for name, value in given}

    def values_of_link(self, query: Mapping[str, str]) -> list[Any]:
        """Returns the values of the components as a link says; `gr.skip()` for what it leaves out.

        Raises InputError for text that is no class or value, or that a slider cannot show.
        """
        values: list[Any] = [gr.skip()]
        if "labels" in query:
            values = [[self._class(text) for text in query["labels"].split(",")]]
        for name, component in zip(self.names, self.components[self._has_classes :], strict=True):
            if name not in query:
                values.append(gr.skip())
                continue
            value = self._option(name, query[name])
            if isinstance(component, gr.Slider):
                _check_slider(name, value, component)
            values.append(flag_text(value) if isinstance(value, tuple) else value)
        return values

    def _class(self, text: str) -> int:
        classes = self.model.sampler.classes
        if text == "none":
            return classes
        label = self.model.sampler.labels.number(text)
        if not 0 <= label <= classes:
            raise InputError(f"labels={text}: allowed are 0 … {classes - 1}, or none")
        return label

    def _option(self, name: str, value: Any) -> Any:
        hint = self._hints[name]
        if isinstance(value, str):
            if not value.strip():
                return None
            try:
                return parse_option(name, hint, value.strip())
            except argparse.ArgumentTypeError as error:
                raise InputError(str(error)) from None
        whole = int in (hint, *typing.get_args(hint))  # a slider may return 7.0
        return int(value) if whole and value is not None and value == int(value) else value


def class_control(model: DemoModel, classes: Sequence[int], several: bool = True) -> Any:
    """Makes the choice of classes by name; its value is a list of numbers, or one number.

    Args:
        model: model whose classes are offered, and "no class".
        classes: classes that are chosen at first.
        several: whether several classes can be chosen.
    """
    sampler = model.sampler
    titles = class_titles(range(sampler.classes + 1), sampler.labels)
    return gr.Dropdown(
        [(title, number) for number, title in enumerate(titles)],
        value=list(classes) if several else classes[0],
        multiselect=several,
        label="classes" if several else "class",
        info="type to search; none of them means no class" if several else "type to search",
    )


def model_choice(models: Sequence[DemoModel], chosen: int = 0) -> Any:
    """Makes the choice of a model by its number; hidden if there is one model.

    Args:
        models: models of the page.
        chosen: number of the model that is chosen at first.
    """
    return gr.Radio(
        [(model.location, number) for number, model in enumerate(models)],
        value=chosen,
        label="model",
        visible=len(models) > 1,
    )


def add_model_controls(
    models: Sequence[DemoModel], chosen: int = 0, classes: bool = True
) -> tuple[Any, list[OptionControls]]:
    """Adds a choice of models, if there are several, and the controls of each.

    Args:
        models: models of the page.
        chosen: number of the model that is chosen at first.
        classes: whether the controls choose classes, too.

    Returns:
        The choice, whose value is a model's number, and the controls.
    """
    choice = model_choice(models, chosen)
    groups, controls = [], []
    for number, model in enumerate(models):
        with gr.Column(visible=number == chosen) as group:
            controls.append(OptionControls(model, first_classes(model) if classes else None))
        groups.append(group)
    if len(models) > 1:
        choice.change(
            lambda chosen: [gr.Column(visible=chosen == n) for n in range(len(models))],
            choice,
            groups,
            concurrency_limit=None,
            show_progress="hidden",
        )
    return choice, controls


def read_controls(
    controls: Sequence[OptionControls], chosen: int, values: Sequence[Any]
) -> tuple[list[int], dict[str, Any]]:
    """Returns the classes and the options of the chosen model from the page.

    Args:
        controls: controls of each model.
        chosen: number of the chosen model.
        values: values of the components of all models' controls.

    Raises:
        InputError: text that is no value of an option.
    """
    start = sum(len(each.components) for each in controls[:chosen])
    own = controls[chosen]
    return own.read(values[start : start + len(own.components)])


def first_classes(model: DemoModel) -> list[int]:
    """Returns the classes that a page draws at first, evenly spread."""
    spread = np.linspace(0, model.sampler.classes - 1, FIRST_CLASSES).astype(int)
    return list(dict.fromkeys(spread.tolist()))


def add_seed(name: str = "") -> Any:
    """Adds a random seed, and a button that chooses another one.

    Args:
        name: prefix of the identifier in the page; "" for "seed" alone.
    """
    with gr.Row():
        identifier = f"{name}-seed".strip("-")
        seed = gr.Number(0, label="seed", precision=0, minimum=0, scale=3, elem_id=identifier)
        another = gr.Button("Another seed", scale=1, min_width=80, size="sm")
    another.click(None, None, seed, js="() => Math.floor(Math.random() * 2 ** 32)")
    return seed


def link_query(drawing: Drawing, number: int) -> str:
    """Returns the query of a link to a drawing: "?labels=3,1&count=2&seed=0&guidance=2.0".

    Args:
        drawing: what the link draws.
        number: number of the model on the page.
    """
    none = drawing.model.sampler.classes
    labels = ",".join("none" if label == none else str(label) for label in drawing.labels)
    query = {"model": str(number)} if number else {}
    query |= {"labels": labels, "count": str(drawing.count), "seed": str(drawing.seed)}
    query |= {name: flag_text(value) for name, value in drawing.changes.items()}
    return "?" + urllib.parse.urlencode(query, safe=",:")


def _control(field: dataclasses.Field, value: Any) -> Any:
    """Returns the control of an option: a slider, a checkbox, or else text."""
    about = {"label": field.name, "info": field.metadata["help"]}
    slider = field.metadata["slider"]
    if isinstance(value, bool):
        return gr.Checkbox(value, **about)
    if slider is None or isinstance(value, tuple):
        return gr.Textbox(flag_text(value), **about)
    low, high, step = slider
    return gr.Slider(low, max(high, value), value, step=step, **about)


def _check_slider(name: str, value: Any, slider: Any) -> None:
    """Raises InputError unless a slider can show the value of an option."""
    low, high = slider.minimum, slider.maximum
    valid = isinstance(value, int | float) and low <= value <= high  # False for NaN
    allowed = f"one number from {low} to {high} on this page (varjax sample takes others)"
    check_setting(name, flag_text(value), valid, allowed)
