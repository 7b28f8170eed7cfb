import dataclasses
import inspect
import typing

import pytest

from varjax.models import FAMILIES


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("method", ["sample", "edit"])
def test_signatures_list_every_option(family, method):
    """The options dataclass defines the options; editors and help() read the signatures."""
    function = getattr(family.pipeline, method)
    parameters = inspect.signature(function).parameters
    keywords = [
        p
        for p in parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in ("index", "choose", "every_step")
    ]
    assert [p.name for p in keywords] == [f.name for f in dataclasses.fields(family.options)]
    types, annotations = typing.get_type_hints(family.options), typing.get_type_hints(function)
    for parameter in keywords:
        assert parameter.default is None, parameter.name
        allowed = set(typing.get_args(annotations[parameter.name]))
        needed = typing.get_args(types[parameter.name]) or (types[parameter.name],)
        assert {*needed, type(None)} <= allowed, parameter.name
