import pathlib

import pytest

from varjax.config.arguments import split_argument


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("d16,data=folder:a, b", ["d16", "data=folder:a, b"]),
        ("data=folder:a, b,size=8", ["data=folder:a, b", "size=8"]),
        ("from=a, b,data=folder:a, b,x", ["from=a, b", "data=folder:a, b", "x"]),
        ("data=folder:a,d16", ["data=folder:a", "d16"]),
        ("data=folder:none, b", ["data=folder:none", " b"]),
        ("data=folder:c\\,d,size=8", ["data=folder:c,d", "size=8"]),
        ("", [""]),
    ],
)
def test_commas_separate_words_except_in_existing_paths(text, words):
    for name in ("a", "a, b"):
        pathlib.Path(name).mkdir()
    assert split_argument(text) == words
